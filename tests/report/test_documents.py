"""The documents that runs leave behind."""

from typing import Any

import pytest

from qdiff_fx.calibration.report import quality_line
from qdiff_fx.report.documents import widest_channels


def factor(layer: str, spread: float, reason: str = "") -> dict[str, Any]:
    return {
        "layers": (layer,),
        "exponent": 0.5,
        "shifted": False,
        "gain_db": 1.0,
        "spread": spread,
        "spread_after": 1.5,
        "own_step": False,
        "reason": reason,
    }


def test_the_widest_channels_come_first_and_untried_tensors_not_at_all() -> None:
    rows = widest_channels([factor("a", 3.0), factor("b", 50.0), factor("c", 90.0, reason="rotated")], count=8)
    assert [(row["layer"], row["spread"], row["spread_after"]) for row in rows] == [("b", 50.0, 1.5), ("a", 3.0, 1.5)]


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
