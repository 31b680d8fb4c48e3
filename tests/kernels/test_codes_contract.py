"""Every backend's quantize steps and stored weights are the reference's."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn

from contract_backends import KERNELS, Build, Tried, integer_layer, lowered
from contract_cases import ROUNDING, Operands
from qdiff_fx.numerics.affine import along_axis, reciprocal

aten = torch.ops.aten
qdiff = torch.ops.qdiff

SHAPES = pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 6, 9, 8), 1), ((2, 31, 6), 2), ((2, 3, 7, 6), 3), ((2, 6, 9), 1), ((0, 6, 5, 4), 1), ((2, 0, 6), 2)],
    ids=["image", "tokens", "rows", "conv1d", "empty-batch", "empty-sequence"],
)
FACTORS = pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
STEP = 1 / 14


def inverse_scales(channels: int, vector: bool) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(channels, generator=generator) * 40 + 1 if vector else torch.tensor(1 / STEP)


NEXT_TO_TIES = 2.5e-4
"""Of a step: further than the 12 roundings of `roundings_beside_the_reference`, 1.8e-4, and little more."""


def activations(shape: tuple[int, ...], inv_scale: Tensor, axis: int) -> Tensor:
    """Values whose codes a relative error of 3e-6 would change, in range and past it; infinities and two ties."""
    generator = torch.Generator().manual_seed(2)
    below = torch.randint(-200, 200, shape, generator=generator)
    side = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    codes = below + 0.5 + side * NEXT_TO_TIES
    values = (codes.double() / along_axis(inv_scale.double(), len(shape), axis)).float()
    extremes = torch.tensor([torch.inf, -torch.inf, 0.25, -0.25])
    values.view(-1)[:4] = extremes[: values.numel()]
    return values


@pytest.mark.parametrize("backend", [name for name in KERNELS if name != "qdq"], indirect=True)
@SHAPES
@FACTORS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_equal_to_the_bit(
    backend: Tried, shape: tuple[int, ...], vector: bool, axis: int, dtype: torch.dtype
) -> None:
    inv_scale = inverse_scales(shape[axis], vector)
    x = activations(shape, inv_scale, axis).to(dtype)
    arguments = (120, 0, 255, axis)

    def build(graph: fx.Graph, root: nn.Module, given: list[fx.Node]) -> fx.Node:
        root.register_buffer("inv_scale", inv_scale)
        return graph.call_function(qdiff.quantize.default, (given[0], graph.get_attr("inv_scale"), *arguments))

    result = lowered(backend, [x], build)(x)
    assert torch.equal(result, qdiff.quantize.default(x, inv_scale, *arguments))
    if backend.name in ("x86", "cuda"):  # channels are neighbours, as their kernels read them
        image = axis == 1 and len(shape) == 4
        assert result.is_contiguous(memory_format=torch.channels_last if image else torch.contiguous_format)


def identity_layer(
    shape: tuple[int, ...], axis: int, inv_scale: Tensor, grid: tuple[int, int, int], step: float = STEP
) -> Build:
    """A layer that returns the codes it reads, less their zero point, times `step`; [B, C, L] runs as a conv1d."""
    channels, image = shape[axis], axis == 1
    weight = torch.eye(channels, dtype=torch.int8)
    operands = Operands((1, channels), (channels, channels), "int8", last=255, scaled=False)
    operands.tensors["weight"] = weight[:, :, None, None] if image else weight
    operands.x_scale = step
    tail = ([channels, channels, 1, 1], [1, 1], [0, 0], [1, 1], 1) if image else ([channels, channels],)
    target = qdiff.conv2d.default if image else qdiff.linear.default

    def build(graph: fx.Graph, root: nn.Module, given: list[fx.Node]) -> fx.Node:
        root.register_buffer("inv_scale", inv_scale)
        codes = graph.call_function(qdiff.quantize.default, (given[0], graph.get_attr("inv_scale"), *grid, axis))
        if image and len(shape) == 3:
            codes = graph.call_function(aten.unsqueeze.default, (codes, 2))
        return integer_layer(graph, root, codes, target, operands, grid[0], (*tail, torch.float32))

    return build


def near_ties(x: Tensor, inv_scale: Tensor, axis: int, roundings: int) -> Tensor:
    """Where so many float32 roundings of a code of at most 255 reach a half step."""
    exact = x.double() * along_axis(inv_scale.double(), x.ndim, axis)
    return ((exact - exact.floor()) - 0.5).abs() < roundings * ROUNDING * 255


def roundings_beside_the_reference(backend: str, vector: bool) -> int:
    """Codes made by other arithmetic than the reference's one product may differ by a step next to a half step.

    FakeQuantize is x a + b: a of two bounds, their difference and a quotient, b of a bound and a, then one rounding;
    linears multiply by the factors first. Of a vector, q/dq rounds the factor, a product with it, 1 / step and a
    product with that, where the reference rounds one product.
    """
    return {"openvino": 12, "qdq": 5 if vector else 0}.get(backend, 0)


@SHAPES
@FACTORS
@pytest.mark.parametrize("grid", [(120, 0, 255), (0, 0, 255), (7, 0, 15)], ids=["a8", "unsigned", "a4"])
def test_layers_read_the_codes(
    backend: Tried, shape: tuple[int, ...], vector: bool, axis: int, grid: tuple[int, int, int]
) -> None:
    inv_scale = inverse_scales(shape[axis], vector)
    x = activations(shape, inv_scale, axis)
    run = lowered(backend, [x], identity_layer(shape, axis, inv_scale, grid))
    seen = (run(x) / STEP).round() + grid[0]
    seen = seen[:, :, 0] if x.ndim == 3 and axis == 1 else seen
    wanted = qdiff.quantize.default(x, inv_scale, *grid, axis).float()
    ties = near_ties(x, inv_scale, axis, roundings_beside_the_reference(backend.name, vector))
    assert int(ties.sum()) <= 4  # two are among the activations
    assert torch.equal(seen[~ties], wanted[~ties])
    assert ((seen - wanted).abs() <= 1).all()


@settings(max_examples=40)
@given(step=st.floats(2.0**-10, 8.0, width=32), shifts=st.lists(st.integers(-3, 3), min_size=6, max_size=6))
def test_factors_that_are_powers_of_two_leave_codes_of_qdq_to_the_bit(step: float, shifts: list[int]) -> None:
    inv_scale = reciprocal(step * torch.exp2(torch.tensor(shifts, dtype=torch.float32)))
    shape, grid = (2, 9, 6), (120, 0, 255)
    x = activations(shape, inv_scale, 2)
    x[1] = (torch.randint(-120, 120, (9, 6)) + 0.5) * step * torch.exp2(torch.tensor(shifts))  # ties, or next to them
    run = lowered(Tried(name="qdq"), [x], identity_layer(shape, 2, inv_scale, grid, step))
    assert torch.equal((run(x) / step).round() + 120, qdiff.quantize.default(x, inv_scale, *grid, 2).float())


@pytest.mark.parametrize("stored", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 3, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_layers_in_the_carrier_type_are_equal_to_the_bit(
    backend: Tried, stored: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Read through a layer on unit vectors: every output is one weight, or a sum of it and zeros."""
    operands = Operands((1, shape[1]), shape, stored, last=255, scaled=True)
    image = len(shape) == 4
    units = torch.eye(shape[1], dtype=dtype)
    if image:
        units = nn.functional.pad(units[:, :, None, None], (1, 1, 1, 1))

    def build(graph: fx.Graph, root: nn.Module, given: list[fx.Node]) -> fx.Node:
        constants: list[fx.Node | None] = []
        for name in ("weight", "scale", "zero_point"):
            if operands[name] is not None:
                root.register_buffer(name, operands[name])
            constants.append(None if operands[name] is None else graph.get_attr(name))
        weight = graph.call_function(qdiff.dequantize_weight.default, (*constants, list(shape), dtype))
        if image:
            return graph.call_function(aten.conv2d.default, (given[0], weight, None, [1, 1], [1, 1], [1, 1], 1))
        return graph.call_function(aten.linear.default, (given[0], weight))

    run = lowered(backend, [units], build)
    assert str(qdiff.dequantize_weight.default) not in run.targets
    result = run(units).transpose(0, 1)
    scale = operands["scale"].double().view(-1, *[1] * (len(shape) - 1))
    wanted = (operands.integers.double() * scale).float().to(dtype)  # the product is exact in float64: one rounding
    assert torch.equal(result.flip(2, 3) if image else result, wanted)
