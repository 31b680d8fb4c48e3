"""The bounded sample: size, fairness, determinism."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff_fx.observers.reservoir import Reservoir, extend


def empty() -> Reservoir:
    return Reservoir(torch.empty(0), torch.zeros((), dtype=torch.int64))


def fill(sizes: list[int], capacity: int, seed: int = 0) -> Reservoir:
    """Batch i consists of the value i."""
    reservoir = empty()
    for index, size in enumerate(sizes):
        batch = torch.full((size,), float(index))
        reservoir = extend(reservoir, batch, seed=seed, batch=index, capacity=capacity)
    return reservoir


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(1, 100))
def test_holds_everything_or_exactly_its_capacity(sizes: list[int], capacity: int) -> None:
    reservoir = fill(sizes, capacity)
    assert reservoir.values.numel() == min(sum(sizes), capacity)
    assert int(reservoir.offered) == sum(min(size, capacity) for size in sizes)
    assert set(reservoir.values.tolist()) <= set(map(float, range(len(sizes))))


def test_each_batch_has_an_even_share() -> None:
    capacity, count = 10_000, 20
    values = fill([capacity] * count, capacity).values
    shares = torch.bincount(values.to(torch.int64), minlength=count) / capacity
    # What is left of a batch is random: a standard deviation of at most sqrt(1 / 20 / 10000) = 0.0022; 5 of them.
    assert (shares - 1 / count).abs().max() < 0.011


def test_batches_smaller_than_the_sample_share_by_size() -> None:
    values = fill([1000, 3000] * 10, 2000).values
    odd = float((values % 2).mean())
    assert odd == pytest.approx((2000 * 10) / (3000 * 10), abs=0.05)  # each offers at most the capacity, 2000


def test_choices_depend_on_seed_and_batch_alone() -> None:
    x = torch.arange(1000.0)
    first = extend(empty(), x, seed=1, batch=4, capacity=50).values
    torch.rand(3)
    assert torch.equal(first, extend(empty(), x, seed=1, batch=4, capacity=50).values)
    assert not torch.equal(first, extend(empty(), x, seed=2, batch=4, capacity=50).values)
    assert not torch.equal(first, extend(empty(), x, seed=1, batch=5, capacity=50).values)


def test_a_small_batch_goes_in_whole() -> None:
    x = torch.tensor([3.0, 1.0, 2.0])
    assert torch.equal(extend(empty(), x, seed=0, batch=0).values, x)
