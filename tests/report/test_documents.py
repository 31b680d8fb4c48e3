"""The documents that runs leave behind."""

from typing import Any

import pytest

from qdiff_fx.calibration.channels import channel_cells, left_alone, widest_channels
from qdiff_fx.calibration.report import quality_line


def factor(layer: str, spread: float, reason: str = "") -> dict[str, Any]:
    return {
        "layers": (layer,),
        "exponent": 0.5,
        "shifted": False,
        "gain_db": 1.0,
        "spread": spread,
        "spread_after": 1.5,
        "own_step": False,
        "learned": False,
        "reason": reason,
    }


def test_the_widest_channels_come_first_and_untried_tensors_not_at_all() -> None:
    rows = widest_channels([factor("a", 3.0), factor("b", 50.0), factor("c", 90.0, reason="rotated")], count=8)
    assert [(row["layer"], row["spread"], row["spread_after"]) for row in rows] == [("b", 50.0, 1.5), ("a", 3.0, 1.5)]


def test_a_tensor_tells_its_channels_before_and_after_and_the_candidate_that_was_taken() -> None:
    row = factor("a", 3.0)
    assert channel_cells(widest_channels([row])[0]) == ("3.0×", "1.5×", "a = 0.5", "–1.0")
    (shifted,) = widest_channels([row | {"shifted": True, "learned": True}])
    assert channel_cells(shifted)[2] == "a = 0.5, shifted, learned"
    assert channel_cells(widest_channels([row | {"exponent": None}])[0]) == ("3.0×", "off", "", "")


def test_operands_that_were_left_alone_stand_under_their_reason() -> None:
    rows = [factor("a.value", 1.0, "rotated"), factor("b.value", 1.0), factor("c.value", 1.0, "rotated")]
    assert left_alone(rows) == [{"reason": "rotated", "tensors": ["a.value", "c.value"]}]


@pytest.mark.parametrize(
    ("summary", "line"),
    [
        ({}, "output quality was not measured"),
        (
            {"quality": {"samples": 8, "pooled_db": 20.04, "median_db": None, "accepted": True}},
            "output SQNR on held-out inputs: 20.0 dB pooled, inf dB in the median over timesteps",
        ),
        (
            {"quality": {"samples": 8, "pooled_db": 3.0, "median_db": 4.0, "accepted": False}},
            "output SQNR on held-out inputs: 3.0 dB pooled, 4.0 dB in the median over timesteps (doubtful)",
        ),
    ],
)
def test_a_stored_quality_is_one_line(summary: dict[str, Any], line: str) -> None:
    assert quality_line(summary) == line
