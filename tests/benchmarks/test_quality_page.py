"""The page of the reconstruction chain: which steps lose, and what their end points resolve."""

from __future__ import annotations

from typing import Any

from quality_page import TOLERATED_LOSS_DB, _paired, _steps


def cell(name: str, pooled: float, samples: list[float]) -> dict[str, Any]:
    ordered = sorted(samples)
    middle = ordered[len(ordered) // 2]
    return {
        "cell": name,
        "pooled_db": pooled,
        "median_db": pooled,
        "endpoint_db": middle,
        "endpoint_by_sample": samples,
    }


def test_a_losing_step_is_listed_by_its_yardstick() -> None:
    before, after = cell("W4A8/RTN MSE", 20.0, [30.0, 31.0, 32.0]), cell("W4A8/split", 19.0, [31.0, 32.0, 33.0])
    table = _steps({row["cell"]: row for row in (before, after)})
    assert "| W4A8 | RTN MSE -> split | pooled | -1.00 | – |" in table
    assert "end point" not in table.split("|---|")[-1]


def test_a_step_that_loses_within_the_tolerance_is_not() -> None:
    before = cell("W4A8/RTN MSE", 20.0, [30.0])
    after = cell("W4A8/split", 20.0 - TOLERATED_LOSS_DB / 2, [30.0])
    assert _steps({row["cell"]: row for row in (before, after)}).endswith("None.")


def test_lost_end_points_tell_the_mean_by_sample_and_its_error() -> None:
    before, after = cell("W8A8/split", 30.0, [40.0, 41.0, 42.0, 20.0]), cell("W8A8/LSQ", 30.0, [39.0, 39.0, 42.0, 28.0])
    mean, error = _paired(before, after)
    # Differences -1, -2, 0, 8: mean 1.25, standard deviation 4.57 over the root of 4.
    assert round(mean, 2) == 1.25 and round(error, 2) == 2.29
    assert "| -2.00 | +1.25 ± 2.29 |" in _steps({row["cell"]: row for row in (before, after)})
