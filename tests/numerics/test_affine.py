"""The quantizer's arithmetic: properties, gradients against closed forms, and torchao as an independent reference."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from qdiff_fx.errors import QuantSpecError
from qdiff_fx.numerics.affine import check_qparams, dequantize, fake_quantize, qparams_from_range, quantize, reciprocal
from qdiff_fx.numerics.spec import QuantSpec, activation_spec, probability_spec, weight_spec

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.float32(2.0**-149))

# Codes differ by at most 255, and three float32 roundings (reciprocal, product, product back) move a value of 255 steps
# by at most 3 * 255 * 2^-24 steps: this much on top of half a step.
ROUNDING_STEPS = 3 * 256 * 2.0**-24

SPECS = [
    *(activation_spec(bits) for bits in range(2, 9)),
    *(QuantSpec(bits=bits, signed=True) for bits in (2, 4, 8)),
    *(QuantSpec(bits=bits, signed=True, symmetric=True) for bits in (2, 4, 8)),
    *(QuantSpec(bits=bits, signed=True, symmetric=True, narrow=True) for bits in (2, 4, 8)),
    *(probability_spec(bits) for bits in (2, 8)),
]
TWO_SIDED = [spec for spec in SPECS if spec.signed or not spec.symmetric]

specs = st.sampled_from(SPECS)
two_sided = st.sampled_from(TWO_SIDED)


def tensors(largest: float = LARGEST) -> st.SearchStrategy[Tensor]:
    """Float32 tensors of 1 to 3 dimensions, subnormal values and zeros included."""
    values = st.floats(-largest, largest, width=32)
    return arrays(np.float32, array_shapes(max_dims=3, max_side=5), elements=values).map(torch.from_numpy)


def scales() -> st.SearchStrategy[Tensor]:
    return st.floats(2.0**-60, 2.0**60, width=32).map(torch.tensor)


def zero_points(spec: QuantSpec) -> st.SearchStrategy[Tensor]:
    low, high = (0, 0) if spec.symmetric else (spec.qmin, spec.qmax)
    return st.integers(low, high).map(lambda code: torch.tensor(code, dtype=torch.int32))


@given(tensors(largest=LARGEST / 4), two_sided)
def test_error_is_at_most_half_a_step_inside_the_range(x: Tensor, spec: QuantSpec) -> None:
    scale, zero_point = qparams_from_range(x.min(), x.max(), spec)
    error = fake_quantize(x, scale, zero_point, spec).double() - x.double()
    assert (error.abs() <= scale.double() * (0.5 + ROUNDING_STEPS)).all()


@given(tensors(largest=LARGEST / 4), st.sampled_from([probability_spec(bits) for bits in range(2, 9)]))
def test_unsigned_symmetric_error_is_half_a_step_for_positive_and_zero_for_the_rest(x: Tensor, spec: QuantSpec) -> None:
    scale, zero_point = qparams_from_range(x.min(), x.max(), spec)
    error = fake_quantize(x, scale, zero_point, spec).double() - x.clamp(min=0.0).double()
    assert (error.abs() <= scale.double() * (0.5 + ROUNDING_STEPS)).all()


@given(st.data(), specs, scales())
def test_values_outside_the_range_saturate(data: st.DataObject, spec: QuantSpec, scale: Tensor) -> None:
    zero_point = data.draw(zero_points(spec))
    beyond = data.draw(st.floats(1.0, 1e6))
    ends = torch.tensor([spec.qmin, spec.qmax]) - zero_point
    x = torch.cat([(ends + torch.tensor([-beyond, beyond])) * scale, torch.tensor([-torch.inf, torch.inf])])
    codes = quantize(x, reciprocal(scale), zero_point, spec.qmin, spec.qmax)
    assert codes.tolist() == [spec.qmin, spec.qmax, spec.qmin, spec.qmax]


@given(tensors(), specs)
def test_zero_maps_to_zero_exactly(x: Tensor, spec: QuantSpec) -> None:
    scale, zero_point = qparams_from_range(x.min(), x.max(), spec)
    assert quantize(torch.zeros(1), reciprocal(scale), zero_point, spec.qmin, spec.qmax).item() == zero_point
    assert fake_quantize(torch.zeros(1), scale, zero_point, spec).item() == 0.0


@given(st.data(), tensors(), specs, scales())
def test_quantizing_twice_changes_nothing(data: st.DataObject, x: Tensor, spec: QuantSpec, scale: Tensor) -> None:
    zero_point = data.draw(zero_points(spec))
    once = fake_quantize(x, scale, zero_point, spec)
    assert torch.equal(fake_quantize(once, scale, zero_point, spec), once)


@given(tensors(), specs)
def test_a_chosen_grid_is_idempotent_whatever_the_range(x: Tensor, spec: QuantSpec) -> None:
    grid = qparams_from_range(x.min(), x.max(), spec)
    once = fake_quantize(x, *grid, spec)
    assert torch.equal(fake_quantize(once, *grid, spec), once)


@given(st.data(), tensors(), specs, scales())
def test_larger_values_never_get_smaller_codes(data: st.DataObject, x: Tensor, spec: QuantSpec, scale: Tensor) -> None:
    zero_point = data.draw(zero_points(spec))
    codes = quantize(x.flatten().sort().values, reciprocal(scale), zero_point, spec.qmin, spec.qmax)
    assert all(low <= high for low, high in pairwise(codes.tolist()))
    assert torch.equal(codes, codes.round())
    assert spec.qmin <= codes.min() and codes.max() <= spec.qmax


@given(tensors(largest=2.0**20), st.integers(-20, 20), specs)
def test_a_power_of_two_scales_grid_and_values_exactly(x: Tensor, exponent: int, spec: QuantSpec) -> None:
    x = torch.where(x.abs() < 2.0**-60, 0.0, x)  # far from subnormal on either side of the factor
    assume(bool(x.any()) and not (spec == probability_spec(spec.bits) and x.max() <= 0))
    factor = 2.0**exponent
    grid, scaled = (qparams_from_range(y.min(), y.max(), spec) for y in (x, x * factor))
    assert torch.equal(scaled.scale, grid.scale * factor)
    assert torch.equal(scaled.zero_point, grid.zero_point)
    assert torch.equal(fake_quantize(x * factor, *scaled, spec), fake_quantize(x, *grid, spec) * factor)


@given(tensors(), specs)
def test_per_channel_is_per_tensor_by_channel(x: Tensor, spec: QuantSpec) -> None:
    by_channel = QuantSpec(
        bits=spec.bits, signed=spec.signed, symmetric=spec.symmetric, narrow=spec.narrow, per_channel=True
    )
    rows = x.reshape(x.shape[0], -1)
    together = qparams_from_range(rows.amin(1), rows.amax(1), by_channel)
    values = fake_quantize(x, *together, by_channel)
    for channel in range(x.shape[0]):
        alone = qparams_from_range(x[channel].min(), x[channel].max(), spec)
        assert torch.equal(together.scale[channel], alone.scale)
        assert torch.equal(together.zero_point[channel], alone.zero_point)
        assert torch.equal(values[channel], fake_quantize(x[channel], *alone, spec))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(
    "values",
    [
        pytest.param([0.0, 0.0], id="all zero"),
        pytest.param([3.7, 3.7], id="constant"),
        pytest.param([-3.7, -3.7], id="negative constant"),
        pytest.param([1.0, 5.0], id="positive"),
        pytest.param([-5.0, -1.0], id="negative"),
        pytest.param([-1e-30, 1e-30], id="tiny"),
        pytest.param([-SMALLEST, SMALLEST], id="smallest subnormal"),
        pytest.param([-LARGEST, LARGEST], id="largest"),
        pytest.param([-LARGEST, SMALLEST], id="largest beside subnormal"),
    ],
)
def test_extreme_ranges_give_usable_grids_and_finite_values(values: list[float], spec: QuantSpec) -> None:
    x = torch.tensor(values)
    grid = qparams_from_range(x.min(), x.max(), spec)
    check_qparams(*grid, spec, "layer")
    assert grid.scale.dtype == torch.float32 and grid.zero_point.dtype == torch.int32
    assert torch.isfinite(fake_quantize(x, *grid, spec)).all()
    assert torch.isfinite(fake_quantize(torch.tensor([-LARGEST, LARGEST]), *grid, spec)).all()


@pytest.mark.parametrize("constant", [3.7, -3.7, 1e-20, -1e30])
def test_a_constant_comes_back_as_it_was(constant: float) -> None:
    # The constant is the end of the range, hence a code: only the roundings of scale and product are left.
    x = torch.full((4,), constant)
    for spec in TWO_SIDED:
        values = fake_quantize(x, *qparams_from_range(x.min(), x.max(), spec), spec)
        torch.testing.assert_close(values, x, rtol=2.0**-22, atol=0.0)


def test_nan_stays_nan_and_is_refused_as_a_range() -> None:
    nan = torch.tensor(float("nan"))
    assert quantize(nan, torch.tensor(1.0), 0, 0, 255).isnan()
    with pytest.raises(QuantSpecError, match="want finite"):
        qparams_from_range(nan, torch.tensor(1.0), activation_spec(8))
    with pytest.raises(QuantSpecError, match="want finite"):
        qparams_from_range(torch.tensor(0.0), torch.tensor(float("inf")), activation_spec(8))
    with pytest.raises(QuantSpecError, match="minimum <= maximum"):
        qparams_from_range(torch.tensor(1.0), torch.tensor(0.0), activation_spec(8))


def test_half_steps_round_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, torch.tensor(1.0), 8, 0, 15).tolist() == [6, 6, 8, 8, 10, 10]


@given(tensors(largest=2.0**100), st.integers(1, 4), two_sided)
def test_each_part_of_a_split_has_at_most_the_joint_step(x: Tensor, first: int, spec: QuantSpec) -> None:
    flat = x.flatten()
    assume(flat.numel() > first)
    joint = qparams_from_range(flat.min(), flat.max(), spec)
    assume(bool(flat.any()))
    for part in (flat[:first], flat[first:]):
        # An all-zero part has no step: it gets scale 1 and no error.
        if part.any():
            assert qparams_from_range(part.min(), part.max(), spec).scale <= joint.scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_input_is_kept_and_codes_come_from_its_float32_value(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 101).to(dtype)
    scale, zero_point = torch.tensor(0.043), torch.tensor(64, dtype=torch.int32)
    values = fake_quantize(x, scale, zero_point, activation_spec(8))
    assert values.dtype == dtype
    codes = quantize(x, reciprocal(scale), zero_point, 0, 255)
    assert torch.equal(codes, quantize(x.float(), reciprocal(scale), zero_point, 0, 255))
    assert torch.equal(values, dequantize(codes, scale, zero_point).to(dtype))


@given(st.data(), tensors(largest=1e6), specs)
def test_a_channel_factor_is_a_step_by_channel(data: st.DataObject, x: Tensor, spec: QuantSpec) -> None:
    scale, zero_point = torch.tensor(0.37), data.draw(zero_points(spec))
    factor = data.draw(
        arrays(np.float32, x.shape[-1], elements=st.floats(2.0**-8, 2.0**8, width=32)).map(torch.from_numpy)
    )
    values = fake_quantize(x, scale, zero_point, spec, channel_factor=factor)
    step = scale * factor
    codes = quantize(x, reciprocal(step), zero_point, spec.qmin, spec.qmax)
    assert torch.equal(values, dequantize(codes, step, zero_point))


@given(st.data(), tensors(), specs, scales(), st.booleans())
def test_training_inference_and_composition_agree_to_the_bit(
    data: st.DataObject, x: Tensor, spec: QuantSpec, scale: Tensor, train_scale: bool
) -> None:
    zero_point = data.draw(zero_points(spec))
    composed = dequantize(quantize(x, reciprocal(scale), zero_point, spec.qmin, spec.qmax), scale, zero_point)
    with torch.no_grad():
        assert torch.equal(fake_quantize(x, scale, zero_point, spec), composed)
    trained = fake_quantize(x.clone().requires_grad_(), scale.clone().requires_grad_(train_scale), zero_point, spec)
    assert trained.requires_grad and torch.equal(trained, composed)


@given(st.data(), tensors(largest=40.0), specs)
@settings(max_examples=200)
def test_gradients_are_the_closed_form_of_lsq(data: st.DataObject, x: Tensor, spec: QuantSpec) -> None:
    """Esser et al. 2020: eq. 3 for the scale, the clip mask for the input; in NumPy, float64."""
    scale, zero_point = torch.tensor(0.25), data.draw(zero_points(spec))
    weights = torch.linspace(-1.0, 2.0, x.numel()).view_as(x)
    x, scale = x.requires_grad_(), scale.requires_grad_()
    (fake_quantize(x, scale, zero_point, spec) * weights).sum().backward()
    v = x.detach().double().numpy() / 0.25  # exact: the scale is a power of two
    low, high = spec.qmin - int(zero_point), spec.qmax - int(zero_point)
    by_scale = np.where(v <= low, low, np.where(v >= high, high, np.round(v) - v))
    assert x.grad is not None and scale.grad is not None
    assert np.array_equal(x.grad.numpy(), weights.numpy() * ((v >= low) & (v <= high)))
    expected = (by_scale * weights.double().numpy()).sum()
    # Up to 125 float32 terms of at most 255 * 2 each.
    assert abs(float(scale.grad) - expected) <= 125 * 2.0**-24 * (np.abs(by_scale) * 2).sum() + 1e-12


def test_scale_gradient_is_reduced_to_the_shape_of_the_scale() -> None:
    x = torch.linspace(-2, 2, 24).view(4, 3, 2)
    for shape in [(), (4,), (4, 1, 1), (1, 3, 1)]:
        scale = torch.full(shape, 0.3).requires_grad_()
        spec = QuantSpec(bits=4, signed=True, per_channel=shape == (4,))
        fake_quantize(x, scale, torch.zeros(shape, dtype=torch.int32), spec).sum().backward()
        assert scale.grad is not None and scale.grad.shape == scale.shape


def test_gradient_of_a_saturated_value_is_the_difference_quotient() -> None:
    # Saturated values are linear in the scale, so that a difference quotient is exact; powers of two lose no bits.
    x, zero_point, spec = torch.tensor([-100.0, 100.0]), torch.tensor(5, dtype=torch.int32), activation_spec(4)
    factor = torch.tensor([2.0, 0.5]).requires_grad_()
    scale = torch.tensor(0.5).requires_grad_()
    fake_quantize(x, scale, zero_point, spec, channel_factor=factor).sum().backward()

    def total(scale: float, factor: Tensor) -> float:
        return float(fake_quantize(x, torch.tensor(scale), zero_point, spec, channel_factor=factor).sum())

    assert scale.grad is not None and factor.grad is not None
    assert float(scale.grad) == (total(1.0, factor.detach()) - total(0.5, factor.detach())) / 0.5
    grown = factor.detach() + torch.tensor([0.5, 0.0])
    assert float(factor.grad[0]) == (total(0.5, grown) - total(0.5, factor.detach())) / 0.5


def test_smooth_parts_pass_gradcheck() -> None:
    codes = torch.randint(0, 16, (3, 5), generator=torch.Generator().manual_seed(0))
    scale = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    assert torch.autograd.gradcheck(lambda scale: dequantize(codes, scale, 7), scale.requires_grad_())


# Dynamo itself instantiates the autograd.Function while it traces it.
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break_and_gives_the_same_values_and_gradients() -> None:
    def forward(x: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
        return fake_quantize(x, scale, zero_point, spec, channel_factor=factor)

    spec, zero_point = activation_spec(4), torch.tensor(3, dtype=torch.int32)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for function in (forward, torch.compile(forward, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone(), torch.tensor(0.3), torch.tensor([1.0, 2.0, 0.5, 4.0])]
        with torch.no_grad():
            inference = function(*inputs)
        inputs = [value.requires_grad_() for value in inputs]
        values = function(*inputs)
        values.square().sum().backward()
        results.append([inference, values.detach(), *(value.grad for value in inputs)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize(
    ("scale", "zero_point", "message"),
    [
        (0.0, 0, "scale 0.0"),
        (-1.0, 0, "scale -1.0"),
        (float("nan"), 0, "scale nan"),
        (float("inf"), 0, "scale inf"),
        (SMALLEST, 0, "finite reciprocal"),
        (1.0, -1, r"zero point -1.0: want an integer in \[0, 15\]"),
        (1.0, 16, "zero point 16"),
    ],
)
def test_unusable_parameters_are_refused_with_the_layers_name(scale: float, zero_point: int, message: str) -> None:
    scales = torch.tensor([1.0, scale])
    zero_points = torch.tensor([0, zero_point], dtype=torch.int32)
    with pytest.raises(QuantSpecError, match=f"down.conv: {message}|down.conv: .*{message}"):
        check_qparams(scales, zero_points, activation_spec(4), "down.conv")


def test_a_symmetric_grid_refuses_a_zero_point() -> None:
    with pytest.raises(QuantSpecError, match=r"want an integer in \[0, 0\]"):
        check_qparams(torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), probability_spec(8), "softmax")


def test_torchao_gives_the_same_codes_values_and_grids() -> None:
    """torchao's primitives multiply with the reciprocal too: codes are equal, not close."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's import warns of missing kernels and deprecations
        from torchao.quantization import quant_primitives as torchao_primitives
    generator = torch.Generator().manual_seed(0)
    for spec in (
        activation_spec(8),
        activation_spec(4),
        weight_spec(4),
        weight_spec(8),
        QuantSpec(bits=8, signed=True),
    ):
        x = torch.randn(64, 333, generator=generator) * torch.exp(torch.randn(64, 1, generator=generator))
        x += torch.randn(64, 1, generator=generator)
        rows = x if spec.per_channel else x.reshape(1, -1)
        ours = qparams_from_range(rows.amin(1), rows.amax(1), spec)
        mapping = torchao_primitives.MappingType
        scale, zero_point = torchao_primitives.choose_qparams_affine_with_min_max(
            rows.amin(1).double(),
            rows.amax(1).double(),
            mapping.SYMMETRIC if spec.symmetric else mapping.ASYMMETRIC,
            [1, rows.shape[1]],
            torch.int8 if spec.signed else torch.uint8,
            spec.qmin,
            spec.qmax,
            scale_dtype=torch.float32,
            zero_point_dtype=torch.int32,
        )
        assert torch.equal(ours.scale, scale)
        # Division there, multiplication here: they may part where the quotient is a half step, up to rounding.
        distance = (rows.amin(1).clamp(max=0.0).double() / ours.scale.double()).frac().abs().sub(0.5).abs()
        assert torch.equal(torch.where(distance < 1e-4, zero_point, ours.zero_point), zero_point)

        codes = torchao_primitives.quantize_affine(
            rows, [1, rows.shape[1]], ours.scale, ours.zero_point, torch.int32, spec.qmin, spec.qmax
        )
        scale, zero_point = ours.scale[:, None], ours.zero_point[:, None]
        mine = quantize(rows, reciprocal(scale), zero_point, spec.qmin, spec.qmax)
        assert torch.equal(mine.to(torch.int32), codes)
        values = torchao_primitives.dequantize_affine(
            codes, [1, rows.shape[1]], ours.scale, ours.zero_point, torch.int32, spec.qmin, spec.qmax
        )
        assert torch.equal(dequantize(mine, scale, zero_point), values)
