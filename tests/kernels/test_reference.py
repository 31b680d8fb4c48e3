"""The reference kernels against an independent NumPy implementation in int64: equal accumulators, same outputs."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from qdiff_fx.kernels import reference
from qdiff_fx.numerics.packing import pack_int4, pack_shifts

qdiff = torch.ops.qdiff


# ---------------------------------------------------------------- the independent implementation


def numpy_quantize(
    x: np.ndarray, inv_scale: np.ndarray, zero_point: int, qmin: int, qmax: int, axis: int
) -> np.ndarray:
    """uint8 codes; inv_scale [] or [C] along `axis`. NumPy rounds half to even, as IEEE does."""
    if inv_scale.ndim:
        inv_scale = inv_scale.reshape([-1 if index == axis % x.ndim else 1 for index in range(x.ndim)])
    return np.clip(np.rint(x.astype(np.float32) * inv_scale.astype(np.float32)) + zero_point, qmin, qmax).astype(
        np.uint8
    )


def numpy_unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """4-bit codes, low nibble first."""
    codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
    return codes[: int(np.prod(shape))].reshape(shape).astype(np.int64)


def numpy_fold(codes: np.ndarray, zero_point: np.ndarray, shift: np.ndarray | None, groups: int) -> np.ndarray:
    """(code - zero point) * 2^shift; channel c of a group's rows is channel c of that group."""
    folded = codes - zero_point.astype(np.int64).reshape(-1, *[1] * (codes.ndim - 1))
    if shift is not None:
        rows, columns = codes.shape[:2]
        for row in range(rows):
            for column in range(columns):
                folded[row, column] *= 2 ** int(shift[row // (rows // groups) * columns + column])
    return folded


def numpy_conv2d(
    x: np.ndarray,
    zero_point: int,
    weight: np.ndarray,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> np.ndarray:
    """int64 accumulators of sum (q_x - z_x) * w; the border stands for real zero."""
    batch, _, height, width = x.shape
    outputs, depth, kernel_height, kernel_width = weight.shape
    padded = np.zeros((batch, x.shape[1], height + 2 * padding[0], width + 2 * padding[1]), np.int64)
    padded[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = x.astype(np.int64) - zero_point
    rows = (padded.shape[2] - dilation[0] * (kernel_height - 1) - 1) // stride[0] + 1
    columns = (padded.shape[3] - dilation[1] * (kernel_width - 1) - 1) // stride[1] + 1
    result = np.zeros((batch, outputs, rows, columns), np.int64)
    for output in range(outputs):
        first = output // (outputs // groups) * depth
        for i in range(kernel_height):
            for j in range(kernel_width):
                top, left = i * dilation[0], j * dilation[1]
                window = padded[
                    :,
                    first : first + depth,
                    top : top + stride[0] * (rows - 1) + 1 : stride[0],
                    left : left + stride[1] * (columns - 1) + 1 : stride[1],
                ]
                result[:, output] += np.einsum("bchw,c->bhw", window, weight[output, :, i, j].astype(np.int64))
    return result


# ------------------------------------------------------------------------------------------ cases


@dataclass(frozen=True)
class Case:
    """A convolution with random codes; `batch` 0 is allowed."""

    batch: int = 2
    channels: int = 6
    outputs: int = 4
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    height: int = 8
    width: int = 8
    bits: int = 4
    shifts: bool = False
    seed: int = 0

    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        return [self.stride] * 2, [self.padding] * 2, [self.dilation] * 2, self.groups


@dataclass(frozen=True)
class Stored:
    """A weight as the plan stores it, and the integers that it stands for."""

    weight: Tensor
    zero_point: Tensor | None
    shift: Tensor | None
    shape: list[int]
    integers: np.ndarray


def _stored(case: Case, generator: torch.Generator, *kernel: int) -> Stored:
    shape = [case.outputs, case.channels // case.groups, *kernel]
    if case.bits == 8:
        weight = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
        return Stored(weight, None, None, shape, weight.numpy().astype(np.int64))
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)
    zero_point = torch.randint(0, 16, (case.outputs,), dtype=torch.uint8, generator=generator)
    shift = torch.randint(0, 4, (case.channels,), dtype=torch.uint8, generator=generator) if case.shifts else None
    packed = pack_int4(codes)
    unpacked = numpy_unpack(packed.numpy(), tuple(shape))
    assert np.array_equal(unpacked, codes.numpy())
    integers = numpy_fold(unpacked, zero_point.numpy(), None if shift is None else shift.numpy(), case.groups)
    return Stored(packed, zero_point, None if shift is None else pack_shifts(shift), shape, integers)


def _check_conv2d(case: Case) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randint(
        0, 256, (case.batch, case.channels, case.height, case.width), dtype=torch.uint8, generator=generator
    )
    x_zero_point, x_scale = 37 + case.seed % 3, 0.0123
    stored = _stored(case, generator, case.kernel, case.kernel)
    scale = torch.rand(case.outputs, generator=generator) + 0.01
    bias = torch.randn(case.outputs, generator=generator)
    stride, padding, dilation, groups = case.geometry()
    wanted = numpy_conv2d(
        x.numpy(), x_zero_point, stored.integers, tuple(stride), tuple(padding), tuple(dilation), groups
    )
    integer = reference.integer_weight(stored.weight, stored.zero_point, stored.shift, stored.shape, groups)
    assert integer.dtype == torch.int8 and np.array_equal(integer.numpy(), stored.integers)
    accumulator = reference.conv2d_accumulator(x, x_zero_point, integer, stride, padding, dilation, groups)
    assert accumulator.dtype == torch.int32 and np.array_equal(accumulator.numpy(), wanted)
    common = (stored.weight, scale, stored.zero_point, stored.shift, bias, x_scale, x_zero_point, stored.shape)
    output = qdiff.conv2d(x, *common, stride, padding, dilation, groups, torch.float32)
    _assert_output(output, wanted, x_scale, scale, bias, axis=1)
    assert output.is_contiguous(memory_format=torch.channels_last)


def _assert_output(
    output: Tensor, accumulator: np.ndarray, x_scale: float, scale: Tensor, bias: Tensor, axis: int
) -> None:
    """Within 1e-6 of |acc * scale| + |bias|: three float32 roundings (two products and a sum) are 1.8e-7."""
    shape = [-1 if index == axis % accumulator.ndim else 1 for index in range(accumulator.ndim)]
    product = accumulator * (np.float64(x_scale) * scale.numpy().astype(np.float64)).reshape(shape)
    offset = bias.numpy().astype(np.float64).reshape(shape)
    assert output.shape == accumulator.shape
    assert np.all(np.abs(output.numpy() - (product + offset)) <= 1e-6 * (np.abs(product) + np.abs(offset)))


GEOMETRIES = {
    "1x1": Case(kernel=1, padding=0),
    "1x1 with padding": Case(kernel=1, padding=1),
    "3x3": Case(),
    "3x3 without padding": Case(padding=0),
    "stride 2": Case(stride=2),
    "stride 2 of an odd size": Case(stride=2, height=7, width=9),
    "dilation 2": Case(dilation=2, padding=2),
    "two groups": Case(groups=2),
    "depthwise": Case(groups=6, outputs=6),
    "depthwise with two outputs a channel": Case(groups=6, outputs=12),
    "odd": Case(channels=5, outputs=3, height=5, width=3, kernel=3),
    "5x5": Case(kernel=5, padding=2),
    "a single pixel": Case(height=1, width=1),
    "an empty batch": Case(batch=0),
}


@pytest.mark.parametrize("weights", ["W8", "W4", "W4 with shifts"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv2d_equals_numpy(name: str, weights: str) -> None:
    bits, shifts = (8 if weights == "W8" else 4), weights.endswith("shifts")
    _check_conv2d(Case(**{**vars(GEOMETRIES[name]), "bits": bits, "shifts": shifts}))


@pytest.mark.parametrize("batch", [1, 3, 4, 5])
def test_conv2d_of_any_batch_equals_numpy(batch: int) -> None:
    _check_conv2d(Case(batch=batch, shifts=True))


@settings(max_examples=60)
@given(
    st.builds(
        lambda groups, columns, rows, **rest: Case(
            groups=groups, channels=groups * columns, outputs=groups * rows, **rest
        ),
        groups=st.integers(1, 3),
        columns=st.integers(1, 5),
        rows=st.integers(1, 3),
        batch=st.integers(0, 3),
        kernel=st.integers(1, 3),
        stride=st.integers(1, 3),
        padding=st.integers(0, 3),
        dilation=st.integers(1, 2),
        height=st.integers(5, 9),
        width=st.integers(5, 9),
        bits=st.sampled_from([4, 8]),
        shifts=st.booleans(),
        seed=st.integers(0, 1000),
    )
)
def test_conv2d_equals_numpy_for_any_geometry(case: Case) -> None:
    _check_conv2d(case)


@settings(max_examples=40)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    channels=st.integers(1, 40),
    outputs=st.integers(1, 9),
    bits=st.sampled_from([4, 8]),
    shifts=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_linear_equals_numpy_for_any_shape(
    shape: list[int], channels: int, outputs: int, bits: int, shifts: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (*shape, channels), dtype=torch.uint8, generator=generator)
    stored = _stored(Case(channels=channels, outputs=outputs, bits=bits, shifts=shifts), generator)
    scale, bias = torch.rand(outputs, generator=generator) + 0.01, torch.randn(outputs, generator=generator)
    wanted = (x.numpy().astype(np.int64) - 130) @ stored.integers.T
    integer = reference.integer_weight(stored.weight, stored.zero_point, stored.shift, stored.shape, 1)
    accumulator = reference.linear_accumulator(x, 130, integer)
    assert accumulator.dtype == torch.int32 and np.array_equal(accumulator.numpy(), wanted)
    output = qdiff.linear(
        x, stored.weight, scale, stored.zero_point, stored.shift, bias, 0.02, 130, stored.shape, torch.float32
    )
    _assert_output(output, wanted, 0.02, scale, bias, axis=-1)


def test_the_widest_accumulator_is_exact() -> None:
    """3x3 over 2560 channels at full scale: 255 * 127 * 23040 = 7.5e8 needs 30 bits, far beyond float32."""
    x = torch.full((1, 2560, 3, 3), 255, dtype=torch.uint8)
    x[0, 0, 0, 0] = 254
    weight = torch.full((1, 2560, 3, 3), 127, dtype=torch.int8)
    accumulator = reference.conv2d_accumulator(x, 0, weight, [1, 1], [0, 0], [1, 1], 1)
    assert accumulator.item() == 255 * 127 * 23040 - 127


@settings(max_examples=60)
@given(
    axis=st.sampled_from([0, 1, 2, 3, -1]),
    vector=st.booleans(),
    bits=st.integers(2, 8),
    zero=st.integers(0, 255),
    seed=st.integers(0, 1000),
)
def test_quantize_equals_numpy(axis: int, vector: bool, bits: int, zero: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 4, 5, generator=generator) * 3
    x.view(-1)[:6] = torch.tensor([0.5, 1.5, 2.5, -0.5, torch.inf, -torch.inf])  # ties and saturation
    inv_scale = torch.rand(x.shape[axis], generator=generator) * 20 if vector else torch.tensor(1.0)
    qmax = 2**bits - 1
    codes = qdiff.quantize(x, inv_scale, zero % (qmax + 1), 0, qmax, axis)
    assert codes.dtype == torch.uint8
    assert np.array_equal(codes.numpy(), numpy_quantize(x.numpy(), inv_scale.numpy(), zero % (qmax + 1), 0, qmax, axis))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_carriers_are_rounded_once_at_the_end(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 6, 5, 5), dtype=torch.uint8, generator=generator)
    stored = _stored(Case(bits=8), generator, 3, 3)
    scale, bias = torch.rand(4, generator=generator), torch.randn(4, generator=generator).to(dtype)
    rest = (0.001, 37, stored.shape, [1, 1], [1, 1], [1, 1], 1)
    exact = qdiff.conv2d(x, stored.weight, scale, None, None, bias.float(), *rest, torch.float32)
    assert torch.equal(qdiff.conv2d(x, stored.weight, scale, None, None, bias, *rest, dtype), exact.to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_dequantized_weight_is_integers_times_scale(bits: int) -> None:
    stored = _stored(Case(bits=bits), torch.Generator().manual_seed(0), 3, 3)
    scale = torch.rand(4)
    weight = qdiff.dequantize_weight(stored.weight, scale, stored.zero_point, stored.shape, torch.float32)
    assert np.array_equal(weight.numpy(), stored.integers.astype(np.float32) * scale.numpy().reshape(-1, 1, 1, 1))
