"""Step selection: the right count, distinct, in range; uniform is even and holds both ends."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdiff_fx.calibration.timesteps import STRATEGIES, equal_count_bins, select_steps
from qdiff_fx.errors import ConfigError, InputError


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    num_steps = draw(st.integers(1, 300))
    return num_steps, draw(st.integers(1, num_steps))


@given(counts(), st.sampled_from(list(STRATEGIES)), st.integers(0, 5))
def test_every_strategy_gives_distinct_ascending_steps_in_range(
    sizes: tuple[int, int], strategy: str, seed: int
) -> None:
    num_steps, count = sizes
    steps = select_steps(strategy, num_steps, count, seed=seed)
    assert list(steps) == sorted(set(steps))
    assert len(steps) == count
    assert steps[0] >= 0 and steps[-1] < num_steps
    assert steps == select_steps(strategy, num_steps, count, seed=seed)


@given(counts())
def test_uniform_holds_both_ends_and_its_gaps_differ_by_at_most_one(sizes: tuple[int, int]) -> None:
    num_steps, count = sizes
    steps = select_steps("uniform", num_steps, count)
    if count > 1:
        gaps = [after - before for before, after in itertools.pairwise(steps)]
        assert (steps[0], steps[-1]) == (0, num_steps - 1)
        assert max(gaps) - min(gaps) <= 1


def test_consecutive_strategies_take_their_end_of_the_trajectory() -> None:
    assert select_steps("first", 10, 3) == (0, 1, 2)
    assert select_steps("middle", 10, 4) == (3, 4, 5, 6)
    assert select_steps("last", 10, 3) == (7, 8, 9)
    assert select_steps("uniform", 9, 1) == (4,)


def test_normal_draws_levels_around_two_fifths_of_the_noise() -> None:
    levels = [99 - step for seed in range(200) for step in select_steps("normal", 100, 3, seed=seed)]
    # Mean of N(40, 40) clipped to [0, 99] is 43.8, its standard deviation 31.5; 600 draws: 5 sigma of the mean is 6.4.
    assert abs(sum(levels) / len(levels) - 43.8) < 6.4


@pytest.mark.parametrize(
    ("strategy", "num_steps", "count", "error", "match"),
    [
        ("evenly", 10, 2, ConfigError, "want one of uniform"),
        ("uniform", 10, 11, InputError, "num_timesteps=10 or less"),
        ("uniform", 10, 0, InputError, "want 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(
    strategy: str, num_steps: int, count: int, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        select_steps(strategy, num_steps, count)


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=60), st.integers(1, 20))
def test_bins_ascend_and_hold_equally_many_distinct_values_up_to_one(values: list[float], count: int) -> None:
    bins = equal_count_bins(values, count)
    in_order = [bins[value] for value in sorted(set(values))]
    sizes = [in_order.count(number) for number in sorted(set(in_order))]
    assert in_order == sorted(in_order)
    assert len(sizes) == min(count, len(set(values)))
    assert max(sizes) - min(sizes) <= 1
