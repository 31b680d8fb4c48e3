"""Every backend computes what the reference defines: the same accumulators, and outputs within float32 rounding."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from contract_backends import ZERO_POINTS, Tried, integer_layer, lowered, operator
from contract_cases import (
    CONVS,
    EXACT,
    LINEARS,
    STORED,
    Conv,
    Operands,
    conv_sums,
    exact_output,
    linear_sums,
    rounding_bound,
)

aten = torch.ops.aten
qdiff = torch.ops.qdiff

ZEROS = pytest.mark.parametrize(("backend", "zero_point"), ZERO_POINTS, indirect=["backend"])
CONV_CASES = pytest.mark.parametrize("case", CONVS.values(), ids=CONVS.keys())
LINEAR_CASES = pytest.mark.parametrize(("shape", "outputs"), LINEARS.values(), ids=LINEARS.keys())


def conv_operands(tried: Tried, case: Conv, stored: str, *, scaled: bool) -> Operands:
    return Operands(case.input_shape, case.weight_shape, stored, last=tried.last, groups=case.groups, scaled=scaled)


def conv_tail(case: Conv, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    return (list(case.weight_shape), case.stride, case.padding, case.dilation, case.groups, dtype)


@ZEROS
@pytest.mark.parametrize("stored", STORED)
@CONV_CASES
def test_convolutions_have_equal_accumulators(backend: Tried, case: Conv, stored: str, zero_point: int) -> None:
    zero_point = min(zero_point, backend.last)
    operands = conv_operands(backend, case, stored, scaled=False)
    sums = conv_sums(case, operands, zero_point)
    assert (sums.magnitude < EXACT).all()  # so that sums in float32, in any order, are exact too
    result = operator(backend, qdiff.conv2d.default, operands, conv_tail(case), zero_point)(operands.x)
    assert torch.equal(result, sums.accumulator.float())
    if backend.name != "qdq":  # torch's convolution keeps the layout that it is given
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stored", STORED)
@CONV_CASES
def test_convolution_outputs_agree_within_rounding(backend: Tried, case: Conv, stored: str) -> None:
    operands = conv_operands(backend, case, stored, scaled=True)
    result = operator(backend, qdiff.conv2d.default, operands, conv_tail(case), 7)(operands.x)
    sums = conv_sums(case, operands, 7)
    error = (result.double() - exact_output(operands, sums, 1)).abs()
    assert (error <= rounding_bound(backend.name, operands, sums, 1)).all()


@ZEROS
@pytest.mark.parametrize("stored", STORED)
@LINEAR_CASES
def test_linears_have_equal_accumulators(
    backend: Tried, shape: tuple[int, ...], outputs: int, stored: str, zero_point: int
) -> None:
    zero_point = min(zero_point, backend.last)
    operands = Operands(shape, (outputs, shape[-1]), stored, last=backend.last, scaled=False)
    sums = linear_sums(operands, zero_point)
    assert (sums.magnitude < EXACT).all()
    tail = ([outputs, shape[-1]], torch.float32)
    result = operator(backend, qdiff.linear.default, operands, tail, zero_point)(operands.x)
    assert torch.equal(result, sums.accumulator.float())


@pytest.mark.parametrize("stored", STORED)
@LINEAR_CASES
def test_linear_outputs_agree_within_rounding(
    backend: Tried, shape: tuple[int, ...], outputs: int, stored: str
) -> None:
    operands = Operands(shape, (outputs, shape[-1]), stored, last=backend.last, scaled=True)
    tail = ([outputs, shape[-1]], torch.float32)
    result = operator(backend, qdiff.linear.default, operands, tail, 7)(operands.x)
    sums = linear_sums(operands, 7)
    error = (result.double() - exact_output(operands, sums, -1)).abs()
    assert (error <= rounding_bound(backend.name, operands, sums, -1)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_outputs_are_the_rounded_float32_ones(backend: Tried, dtype: torch.dtype) -> None:
    case = CONVS["3x3"]
    operands = conv_operands(backend, case, "int8", scaled=False)
    operands.x = operands.x % 4  # accumulators below 2^16, so that float16 stays finite
    exact = operator(backend, qdiff.conv2d.default, operands, conv_tail(case), 0)(operands.x)
    narrow = operator(backend, qdiff.conv2d.default, operands, conv_tail(case, dtype), 0)(operands.x)
    assert narrow.dtype == dtype
    assert torch.equal(narrow, exact.to(dtype))


def test_a_contiguous_input_gives_the_same_as_a_channels_last_one(backend: Tried) -> None:
    case = CONVS["odd-size"]
    operands = conv_operands(backend, case, "int8", scaled=False)
    run = operator(backend, qdiff.conv2d.default, operands, conv_tail(case), 9)
    assert torch.equal(run(operands.x.contiguous()), run(operands.x.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("pad", [[0, 1, 0, 1], [2, 0, 1, 0]])
def test_padding_of_one_side_is_real_zero(backend: Tried, pad: list[int]) -> None:
    """As downsamplers of DDPM have it: a pad of the image, then a strided convolution without padding."""
    case = Conv(stride=[2, 2], padding=[0, 0])
    operands = conv_operands(backend, case, "int8", scaled=False)

    def build(graph: fx.Graph, root: nn.Module, given: list[fx.Node]) -> fx.Node:
        root.register_buffer("inv_scale", torch.tensor(1.0))
        x = graph.call_function(aten.constant_pad_nd.default, (given[0], pad, 0.0))
        codes = graph.call_function(qdiff.quantize.default, (x, graph.get_attr("inv_scale"), 9, 0, 255, 1))
        return integer_layer(graph, root, codes, qdiff.conv2d.default, operands, 9, conv_tail(case))

    x = operands.x.float() - 9
    run = lowered(backend, [x], build)
    assert str(qdiff.conv2d.default) not in run.targets
    operands.x = nn.functional.pad(operands.x, pad, value=9)
    assert torch.equal(run(x), conv_sums(case, operands, 9).accumulator.float())
