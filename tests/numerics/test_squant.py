"""SQuant: rounding errors cancel over each kernel and each output channel, and nothing leaves the two neighbours."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff_fx.numerics.squant import squant_rounding

EPSILON = 1e-4
"""Of float32 sums of at most 300 errors."""


def _fractions(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _errors(fraction: torch.Tensor, up: torch.Tensor) -> np.ndarray:
    return (
        (up.double() - fraction.double()).flatten(2).numpy()
        if fraction.ndim > 2
        else (up - fraction)[..., None].numpy()
    )


@given(seed=st.integers(0, 1000), shape=st.sampled_from([(3, 5, 3, 3), (2, 7, 1, 1), (4, 9), (2, 32, 3, 3)]))
def test_errors_sum_to_half_a_step_over_a_channel_and_one_over_a_kernel(seed: int, shape: tuple[int, ...]) -> None:
    fraction = _fractions(shape, seed)
    errors = _errors(fraction, squant_rounding(fraction, torch.ones(shape, dtype=torch.bool)).float())
    nearest = _errors(fraction, (fraction >= 0.5).float())
    # The last flip of a channel may push one kernel from within half a step to the other side of it.
    assert np.abs(errors.sum(2)).max() <= 1.0 + EPSILON
    assert np.abs(errors.sum((1, 2))).max() <= 0.5 + EPSILON
    assert np.abs(errors.sum((1, 2))).max() <= np.abs(nearest.sum((1, 2))).max() + EPSILON


def test_the_largest_error_of_the_kernel_is_what_flips() -> None:
    # Rounded to nearest, errors are -0.4, -0.45 and -0.1: their sum -0.95 is nearest to one step.
    fraction = torch.tensor([0.4, 0.45, 0.1]).view(1, 1, 1, 3)
    free = torch.ones_like(fraction, dtype=torch.bool)
    assert squant_rounding(fraction, free).flatten().tolist() == [False, True, False]


def test_errors_of_several_kernels_cancel_by_one_flip() -> None:
    # Kernels of one weight each: every sum is below half a step, the channel's is -1.2.
    fraction = torch.tensor([0.3, 0.4, 0.2, 0.3]).view(1, 4)
    assert squant_rounding(fraction, torch.ones(1, 4, dtype=torch.bool)).tolist() == [[False, True, False, False]]


def test_a_weight_at_the_end_of_the_grid_has_no_say() -> None:
    fraction = torch.tensor([0.4, 0.45, 0.1]).view(1, 1, 1, 3)
    free = torch.tensor([True, False, True]).view(1, 1, 1, 3)
    assert squant_rounding(fraction, free).flatten().tolist()[1] is False
    assert not bool(squant_rounding(fraction, torch.zeros_like(free)).any())
