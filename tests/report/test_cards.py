"""The headline figures of a run."""

from __future__ import annotations

from typing import Any

import pytest

from qdiff_fx.report.cards import cards


def run(**changes: Any) -> dict[str, Any]:
    row = {"arm": "ours", "preset": "w8a8", "psnr_median_db": 40.0, "seconds_per_step": 0.05} | changes
    return {"settings": {"samples": 16}, "reference": {"seconds_per_step": 0.1}, "table": [row]}


def test_speed_is_shown_against_full_precision_with_the_samples_of_a_step() -> None:
    (card,) = [card for card in cards(run()) if "speed" in card.label]
    assert card.value == "2.00×"
    assert card.detail == "50.0 ms a step of 16 samples, 100.0 ms in full precision; neither is compiled"


@pytest.mark.parametrize("changes", [{"seconds_per_step": None}, {"arm": "rtn"}])
def test_no_speed_is_shown_where_the_network_was_simulated(changes: dict[str, Any]) -> None:
    assert not [card for card in cards(run(**changes)) if "speed" in card.label]
