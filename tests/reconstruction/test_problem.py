"""Minibatches, row weights and the look at convergence."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff_fx.reconstruction.problem import Convergence, minibatches


@given(rows=st.integers(1, 40), batch_size=st.integers(1, 16), seed=st.integers(0, 50))
def test_a_pass_takes_no_row_twice_and_passes_differ(rows: int, batch_size: int, seed: int) -> None:
    size = min(rows, batch_size)
    whole = rows // size
    passes = list(itertools.islice(minibatches(rows, batch_size, seed), 2 * whole))
    for part in (passes[:whole], passes[whole:]):
        taken = torch.cat(part)
        assert len(taken) == whole * size == len(set(taken.tolist()))
        assert set(taken.tolist()) <= set(range(rows))
    again = list(itertools.islice(minibatches(rows, batch_size, seed), 2 * whole))
    assert all(torch.equal(a, b) for a, b in zip(passes, again, strict=True))


def test_a_falling_loss_is_not_settled_and_a_flat_one_is() -> None:
    falling, flat = Convergence(), Convergence()
    assert not any(falling.settled(0.99**step) for step in range(200))
    verdicts = [flat.settled((1.0, 1.5, 0.5, 1.2, 0.8)[step % 5]) for step in range(3 * Convergence.WINDOW + 1)]
    # At the end of the second window there is a mean to compare with, and after that at the end of each.
    assert [place + 1 for place, verdict in enumerate(verdicts) if verdict] == [
        2 * Convergence.WINDOW,
        3 * Convergence.WINDOW,
    ]
