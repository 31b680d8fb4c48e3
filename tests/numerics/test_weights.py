"""Weight codes and folding, against an integer reference in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qdiff_fx.errors import QuantSpecError
from qdiff_fx.numerics.affine import QParams, fake_quantize, qparams_from_range, quantize, reciprocal
from qdiff_fx.numerics.spec import activation_spec, weight_spec
from qdiff_fx.numerics.weights import (
    fake_quantize_weight,
    fold_codes,
    grid_weight,
    input_channel_multiplier,
    weight_codes,
)


def random_layer(
    seed: int, bits: int, groups: int, kernel: tuple[int, ...], with_factor: bool, with_shift: bool
) -> tuple[Tensor, QParams, Tensor | None, Tensor | None]:
    """A weight [4, 6 / groups, *kernel], its grid, and vectors over its 6 input channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 6 // groups, *kernel, generator=generator)
    factor = torch.exp(torch.randn(6, generator=generator)) if with_factor else None
    shift = torch.randint(0, 4, (6,), generator=generator, dtype=torch.uint8) if with_shift else None
    seen = grid_weight(weight, channel_factor=factor, channel_shift=shift, groups=groups).flatten(1)
    return weight, qparams_from_range(seen.amin(1), seen.amax(1), weight_spec(bits)), factor, shift


layers = {
    "seed": st.integers(0, 2**31),
    "groups": st.sampled_from([1, 2]),
    "kernel": st.sampled_from([(), (3,), (3, 3)]),
    "with_factor": st.booleans(),
    "with_shift": st.booleans(),
}


@given(bits=st.integers(2, 8), **layers)
def test_codes_and_folding_equal_the_numpy_integer_reference(
    bits: int, seed: int, groups: int, kernel: tuple[int, ...], with_factor: bool, with_shift: bool
) -> None:
    with_shift = with_shift and bits <= 4  # shifts belong to W4: wider codes have no room
    weight, grid, factor, shift = random_layer(seed, bits, groups, kernel, with_factor, with_shift)
    spec = weight_spec(bits)
    vectors = {"channel_factor": factor, "channel_shift": shift}
    codes = weight_codes(weight, *grid, spec, **vectors, groups=groups)
    folded = fold_codes(codes, grid.zero_point, shift, groups=groups)
    assert folded.dtype == torch.int8

    expected_codes = np.empty(weight.shape, dtype=np.int64)
    expected_folded = np.empty(weight.shape, dtype=np.int64)
    for row in range(weight.shape[0]):
        inv_scale = np.float32(1.0) / grid.scale[row].numpy()
        zero_point = int(grid.zero_point[row])
        for column in range(weight.shape[1]):
            channel = (row // (weight.shape[0] // groups)) * weight.shape[1] + column
            power = 1 if shift is None else 2 ** int(shift[channel])
            multiplier = np.float32(1.0) if factor is None else factor[channel].numpy()
            seen = weight[row, column].numpy() * (multiplier / np.float32(power))
            code = np.clip(np.round(seen * inv_scale).astype(np.int64) + zero_point, spec.qmin, spec.qmax)
            expected_codes[row, column] = code
            expected_folded[row, column] = (code - zero_point) * power
    assert np.array_equal(codes.numpy().astype(np.int64), expected_codes)
    assert np.array_equal(folded.numpy().astype(np.int64), expected_folded)


@pytest.mark.parametrize("groups", [1, 2])
def test_integer_convolution_of_folded_codes_is_the_fake_quantized_convolution(groups: int) -> None:
    """y = acc * s_x * s_w[o], with int64 accumulation, against fp64 convolution of the simulated operands."""
    weight, grid, factor, shift = random_layer(0, 4, groups, (3, 3), with_factor=True, with_shift=True)
    assert factor is not None
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1)) * factor[:, None, None]
    spec, scale, zero_point = activation_spec(8), torch.tensor(0.03), torch.tensor(117, dtype=torch.int32)
    vectors = {"channel_factor": factor, "channel_shift": shift}
    factor_by_channel = factor[:, None, None]

    x_codes = quantize(x, reciprocal(scale * factor_by_channel), zero_point, spec.qmin, spec.qmax)
    folded = fold_codes(
        weight_codes(weight, *grid, weight_spec(4), **vectors, groups=groups), grid.zero_point, shift, groups=groups
    )
    accumulator = functional.conv2d(x_codes.double() - zero_point, folded.double(), groups=groups)
    integer = accumulator * scale.double() * grid.scale.double()[:, None, None]

    x_simulated = fake_quantize(x, scale, zero_point, spec, channel_factor=factor_by_channel).double()
    weight_simulated = fake_quantize_weight(weight, *grid, weight_spec(4), **vectors, groups=groups).double()
    simulated = functional.conv2d(x_simulated, weight_simulated, groups=groups)
    # Six float32 roundings of the operands (steps, products, reciprocal), against the sum of absolute products.
    bound = functional.conv2d(x_simulated.abs(), weight_simulated.abs(), groups=groups) * 6 * 2.0**-24
    assert ((integer - simulated).abs() <= bound).all()


@given(bits=st.integers(2, 4), **layers)
def test_simulated_weight_is_within_half_a_step_of_the_weight(
    bits: int, seed: int, groups: int, kernel: tuple[int, ...], with_factor: bool, with_shift: bool
) -> None:
    weight, grid, factor, shift = random_layer(seed, bits, groups, kernel, with_factor, with_shift)
    vectors = {"channel_factor": factor, "channel_shift": shift, "groups": groups}
    simulated = fake_quantize_weight(weight, *grid, weight_spec(bits), **vectors)
    multiplier = input_channel_multiplier(weight.shape, **vectors)
    step = grid.scale.view(-1, *[1] * (weight.ndim - 1)).double() / (1.0 if multiplier is None else multiplier.double())
    # 15 steps at most, 6 roundings of 2^-24 each.
    assert ((simulated.double() - weight.double()).abs() <= step * (0.5 + 6 * 16 * 2.0**-24)).all()


def test_a_factor_equal_to_its_shift_leaves_codes_and_simulated_weight_as_they_are() -> None:
    weight, grid, _, shift = random_layer(3, 4, 1, (3, 3), with_factor=False, with_shift=True)
    assert shift is not None
    factor = torch.exp2(shift.float())
    plain = weight_codes(weight, *grid, weight_spec(4))
    assert torch.equal(weight_codes(weight, *grid, weight_spec(4), channel_factor=factor, channel_shift=shift), plain)
    simulated = fake_quantize_weight(weight, *grid, weight_spec(4), channel_factor=factor, channel_shift=shift)
    assert torch.equal(simulated, fake_quantize_weight(weight, *grid, weight_spec(4)))


def test_gradient_passes_straight_through_factor_and_shift() -> None:
    weight, grid, factor, shift = random_layer(5, 4, 2, (3, 3), with_factor=True, with_shift=True)
    weight = weight.requires_grad_()
    vectors = {"channel_factor": factor, "channel_shift": shift, "groups": 2}
    fake_quantize_weight(weight, *grid, weight_spec(4), **vectors).sum().backward()
    # The grid covers the weight, and the multiplier cancels up to the rounding of its reciprocal and two products. The
    # end of a range may stick out by the rounding of its zero point: there, and only there, the gradient is 0.
    assert weight.grad is not None
    inside = (weight.grad - 1.0).abs() <= 3 * 2.0**-24
    assert (inside | (weight.grad == 0.0)).all()
    assert inside.float().mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_of_the_weight_is_kept(dtype: torch.dtype) -> None:
    weight, grid, factor, shift = random_layer(6, 4, 1, (), with_factor=True, with_shift=True)
    for vectors in ({}, {"channel_factor": factor, "channel_shift": shift}):
        assert fake_quantize_weight(weight.to(dtype), *grid, weight_spec(4), **vectors).dtype == dtype


def test_w4_with_every_shift_fits_int8() -> None:
    codes = torch.tensor([[0, 15]], dtype=torch.uint8)
    for zero_point in (0, 15):
        folded = fold_codes(codes, zero_point, torch.tensor([3, 3], dtype=torch.uint8))
        assert folded.abs().max() == 120


def test_values_beyond_int8_are_refused() -> None:
    codes = torch.tensor([[0, 255]], dtype=torch.uint8)
    with pytest.raises(QuantSpecError, match=r"\[-100, 155\]: want \[-127, 127\]"):
        fold_codes(codes, 100)
    with pytest.raises(QuantSpecError, match=r"want 0..3"):
        fold_codes(torch.tensor([[1, 1]], dtype=torch.uint8), 0, torch.tensor([0, 4], dtype=torch.uint8))


@pytest.mark.parametrize(("channels", "groups"), [(5, 1), (6, 2), (3, 3)])
def test_a_channel_vector_that_does_not_fit_the_weight_is_refused(channels: int, groups: int) -> None:
    with pytest.raises(QuantSpecError, match=r"channel vector .* for a weight \(4, 6, 3, 3\)"):
        grid_weight(torch.zeros(4, 6, 3, 3), channel_factor=torch.ones(channels), groups=groups)


@pytest.mark.usefixtures("unchecked_shapes")
def test_folding_is_traceable_when_it_does_not_validate() -> None:
    codes = torch.randint(0, 16, (4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([0, 1, 2, 3, 0, 1], dtype=torch.uint8)
    zero_point = torch.tensor([0, 5, 8, 15], dtype=torch.int32)
    compiled = torch.compile(
        lambda codes: fold_codes(codes, zero_point, shift, validate=False), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(codes), fold_codes(codes, zero_point, shift))
