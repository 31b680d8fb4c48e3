"""Learned rounding: both neighbours, the rectified sigmoid, the penalty and its schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff_fx.numerics.adaround import (
    annealed_beta,
    hard_rounding,
    initial_variable,
    reconstruction_loss,
    rounding_gradient,
    rounding_grid,
    rounding_penalty,
    soft_rounding,
)
from qdiff_fx.numerics.affine import qparams_from_range
from qdiff_fx.numerics.spec import weight_spec
from qdiff_fx.numerics.weights import fake_quantize_weight, weight_codes


def _layer(
    bits: int, seed: int, shrink: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 4, 3, 3, generator=generator)
    rows = weight.flatten(1)
    scale, zero_point = qparams_from_range(rows.amin(1) * shrink, rows.amax(1) * shrink, weight_spec(bits))
    factors = {
        "channel_factor": torch.rand(4, generator=generator) + 0.5,
        "channel_shift": torch.randint(0, 4, (4,), generator=generator),
    }
    return weight, scale, zero_point, factors if bits < 8 else {}


@given(bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 1000), shrink=st.sampled_from([1.0, 0.5]))
def test_low_and_low_plus_gap_are_the_weights_that_hard_rounding_gives(bits: int, seed: int, shrink: float) -> None:
    weight, scale, zero_point, factors = _layer(bits, seed, shrink)
    grid = rounding_grid(weight, scale, zero_point, weight_spec(bits), **factors)
    for round_up, real in ((torch.zeros_like(weight), grid.low), (torch.ones_like(weight), grid.low + grid.gap)):
        wanted = fake_quantize_weight(weight, scale, zero_point, weight_spec(bits), round_up=round_up.bool(), **factors)
        # A float32 product and a sum apart: 2 ulp of the largest value.
        assert torch.allclose(real, wanted, rtol=0, atol=float(wanted.abs().max()) * 2**-22)


@given(bits=st.sampled_from([3, 4, 8]), seed=st.integers(0, 1000))
def test_codes_round_to_floor_or_one_above_and_stay_on_the_grid(bits: int, seed: int) -> None:
    weight, scale, zero_point, _ = _layer(bits, seed, 0.7)
    spec = weight_spec(bits)
    round_up = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    codes = weight_codes(weight, scale, zero_point, spec, round_up=round_up)
    view = (-1, 1, 1, 1)
    floor = np.floor((weight * (1.0 / scale).view(view)).numpy()) + zero_point.view(view).numpy()
    wanted = np.clip(floor + round_up.numpy(), spec.qmin, spec.qmax)
    assert np.array_equal(codes.numpy(), wanted)


@given(fraction=st.floats(0.001, 0.999))
def test_learning_starts_at_the_full_precision_weight(fraction: float) -> None:
    value = torch.tensor([fraction])
    assert torch.allclose(soft_rounding(initial_variable(value)), value, atol=1e-5)
    assert bool(hard_rounding(initial_variable(value))) == (fraction >= 0.5) or abs(fraction - 0.5) < 1e-6


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_weight_on_the_grid_has_a_finite_variable_with_a_gradient(fraction: float) -> None:
    variable = initial_variable(torch.tensor([fraction])).requires_grad_()
    soft_rounding(variable).sum().backward()
    assert bool(torch.isfinite(variable).all()) and float(variable.grad) > 0


def test_the_rectified_sigmoid_reaches_both_ends() -> None:
    assert soft_rounding(torch.tensor([-4.0, 0.0, 4.0])).tolist() == [0.0, 0.5, 1.0]


def test_the_penalty_is_zero_for_binary_rounding_and_a_weight_each_in_the_middle() -> None:
    assert float(rounding_penalty(torch.tensor([0.0, 1.0, 1.0]), 20.0)) == 0.0
    assert float(rounding_penalty(torch.tensor([0.5, 0.5]), 2.0)) == 2.0


def test_beta_is_absent_in_the_warm_up_and_then_falls_linearly() -> None:
    schedule = [annealed_beta(progress, warmup=0.2, start=20.0, end=2.0) for progress in (0.0, 0.19, 0.2, 0.6, 1.0)]
    assert schedule == [None, None, 20.0, pytest.approx(11.0), pytest.approx(2.0)]


@pytest.mark.parametrize("exponent", [2.0, 2.4])
def test_the_loss_sums_channels_and_averages_the_rest(exponent: float) -> None:
    output, target = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    wanted = (np.abs(output.double().numpy() - target.double().numpy()) ** exponent).sum(1).mean()
    # float32 sums of 300 positive terms.
    assert float(reconstruction_loss(output, target, exponent)) == pytest.approx(wanted, rel=1e-5)


@given(seed=st.integers(0, 1000), beta=st.sampled_from([None, 2.0, 7.3, 20.0]), spread=st.sampled_from([0.5, 3.0, 8.0]))
def test_the_closed_form_is_the_gradient_of_loss_and_penalty(seed: int, beta: float | None, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    variable = (torch.randn(64, generator=generator) * spread).double().requires_grad_()
    gap, slope = torch.rand(64, generator=generator).double(), torch.randn(64, generator=generator).double()
    rounding = soft_rounding(variable)
    loss = (rounding * gap * slope).sum()
    (loss if beta is None else loss + 0.3 * rounding_penalty(rounding, beta)).backward()
    found = rounding_gradient(variable.detach(), slope, gap, regularization=0.3, beta=beta)
    assert torch.allclose(found, variable.grad, rtol=1e-9, atol=1e-12)
    space = torch.empty(4, 64, dtype=torch.float64)
    again = rounding_gradient(variable.detach(), slope, gap, regularization=0.3, beta=beta, workspace=space)
    assert torch.equal(again, found) and again.data_ptr() == space.data_ptr()
    assert torch.equal(soft_rounding(variable.detach(), out=space[1]), rounding)


def test_smooth_parts_pass_gradcheck() -> None:
    """In float64, away from the corners of |.| and of the clamp."""
    generator = torch.Generator().manual_seed(0)
    variable = torch.randn(12, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(soft_rounding, variable)
    rounding = (0.1 + 0.3 * torch.rand(12, dtype=torch.float64, generator=generator)).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: rounding_penalty(h, 5.0), rounding)
    output = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    target = output.detach() + 0.5
    for exponent in (2.0, 2.4):
        assert torch.autograd.gradcheck(lambda y, power=exponent: reconstruction_loss(y, target, power), output)
