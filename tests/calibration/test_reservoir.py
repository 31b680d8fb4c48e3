"""The reservoir is bounded, even over noise levels, and a fair sample at each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_fx.calibration.reservoir import Reservoir
from qdiff_fx.calibration.split_call import CallRows, split_call


def _no_scratch() -> Path:
    raise AssertionError("nothing should be written")


def _call(timesteps: list[float], first: int = 0) -> CallRows:
    """Rows numbered from `first`."""
    rows = torch.arange(first, first + len(timesteps)).reshape(-1, 1)
    return split_call((rows, torch.tensor(timesteps, dtype=torch.float64)), {})


def _reservoir(levels: int, per_level: int, seed: int = 0) -> Reservoir:
    return Reservoir(levels=levels, per_level=per_level, seed=seed, memory_budget=2**30, scratch=_no_scratch)


streams = st.lists(
    st.lists(st.integers(0, 40).map(float) | st.floats(0, 1000, width=32), min_size=1, max_size=9),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60)
@given(streams, st.integers(1, 5), st.integers(1, 4))
def test_never_more_than_four_shares_are_held_and_shares_are_filled(
    stream: list[list[float]], levels: int, per_level: int
) -> None:
    reservoir = _reservoir(levels, per_level)
    for timesteps in stream:
        for timestep in timesteps:
            reservoir.offer(_call([timestep]))
            assert reservoir.held <= 4 * levels * per_level
            assert reservoir.held == sum(len(rows) for rows in reservoir._rows.values())
    seen = [timestep for timesteps in stream for timestep in timesteps]
    kept = list(reservoir.finish())
    counts: dict[float, int] = {}
    for timestep, _ in kept:
        counts[timestep] = counts.get(timestep, 0) + 1
    assert reservoir.seen == len(seen)
    assert len(counts) <= levels
    assert max(counts.values()) <= per_level
    if len(set(seen)) <= levels:
        assert counts == {timestep: min(per_level, seen.count(timestep)) for timestep in set(seen)}
    assert [timestep for timestep, _ in kept] == sorted(timestep for timestep, _ in kept)


def test_a_big_batch_is_taken_in_row_by_row() -> None:
    reservoir = _reservoir(3, 2)
    reservoir.offer(_call(torch.linspace(0, 1, 500).tolist()))
    assert reservoir.held <= 24
    assert len(list(reservoir.finish())) == 6


@pytest.mark.parametrize("steps", [21, 100, 1000])
def test_long_trajectories_fill_every_bin_evenly(steps: int) -> None:
    reservoir = _reservoir(20, 8)
    for start in range(0, 24, 4):
        for step in reversed(range(steps)):
            reservoir.offer(_call([float(step)] * 4, first=start * steps))
    kept = [row.timestep for _, row in reservoir.finish()]
    assert len(kept) == 160
    counts = torch.histc(torch.tensor(kept), bins=20, min=0, max=steps - 1)
    # Bins are cut by count, histogram cells by value: a level at an edge may stand on either side, at 21 levels a
    # cell can so hold two whole levels of one bin (4 rows each) or of two (8 each).
    assert counts.min() >= 4 and counts.max() <= 16


def test_continuous_levels_are_spread_evenly() -> None:
    reservoir = _reservoir(10, 8)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        reservoir.offer(_call((torch.randn(16, generator=generator) * 1.2 - 1.2).exp().tolist()))
    kept = torch.tensor([row.timestep for _, row in reservoir.finish()])
    # Log-normal, as EDM trains: each tenth of the distribution holds a tenth of the rows, up to where edges fell.
    quantiles = torch.distributions.Normal(-1.2, 1.2).cdf(kept.log())
    counts = torch.histc(quantiles, bins=10, min=0, max=1)
    assert len(kept) == 80
    assert counts.min() >= 5 and counts.max() <= 11


def test_every_row_of_a_level_is_equally_likely_to_stay() -> None:
    hits = torch.zeros(20)
    for seed in range(300):
        reservoir = _reservoir(2, 4, seed)
        for row in range(20):
            reservoir.offer(_call([0.0], first=row))
        for _, stored in reservoir.finish():
            hits[int(stored.leaves()[0])] += 1
    # Binomial(300, 1/5): mean 60, deviation 6.9; 20 counts stay within 4 deviations but once in 800 times.
    assert (hits - 60).abs().max() < 28


def test_seed_decides_which_rows_stay() -> None:
    def kept(seed: int) -> list[int]:
        reservoir = _reservoir(2, 3, seed)
        for row in range(30):
            reservoir.offer(_call([float(row % 7)], first=row))
        return [int(row.leaves()[0]) for _, row in reservoir.finish()]

    assert kept(0) == kept(0)
    assert kept(0) != kept(1)


def test_rows_past_the_budget_go_to_files_and_come_back(tmp_path: Path) -> None:
    plain = _reservoir(4, 3)
    spilling = Reservoir(levels=4, per_level=3, seed=0, memory_budget=40, scratch=lambda: tmp_path)
    for row in range(60):
        for reservoir in (plain, spilling):
            reservoir.offer(_call([float(row % 9)], first=row))
        files = len(list(tmp_path.iterdir()))
        assert spilling.bytes_in_memory <= 40
        assert files + spilling.bytes_in_memory // 16 == spilling.held  # a row: int64 number, float64 timestep
    pairs = zip(plain.finish(), spilling.finish(), strict=True)
    assert all(one[0] == two[0] and torch.equal(one[1].leaves()[0], two[1].leaves()[0]) for one, two in pairs)
