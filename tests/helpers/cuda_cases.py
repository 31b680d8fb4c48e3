"""Layers for the cuda operators with random operands, and what the reference makes of the same operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdiff_fx.kernels import cuda_weights, reference
from qdiff_fx.numerics.packing import pack_int4, pack_shifts

qdiff = torch.ops.qdiff

STORED = ("int8", "int4", "int4-shifted")


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """A convolution, or a linear over `height` tokens where `kernel` is 0, with every choice of its epilogue."""

    batch: int = 2
    channels: int = 8
    outputs: int = 8
    height: int = 5
    width: int = 6
    kernel: tuple[int, int] | None = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    stored: str = "int8"
    x_zero_point: int = 17
    bias: bool = True
    embedding: bool = False
    residual: bool = False
    silu: bool = False
    requantize: bool = False
    carrier: torch.dtype = torch.float32
    tile: tuple[int, int, int] = (32, 32, 32)
    descriptors: bool = False
    split: int = 1
    seed: int = 0
    device: str = "cpu"

    @property
    def arguments(self) -> list[int]:
        return [*self.tile, 4, 1, int(self.descriptors), self.split]


@dataclass(frozen=True)
class Prepared:
    """Arguments of the operator, and its exact result."""

    operator: Any
    arguments: tuple[Any, ...]
    wanted: Tensor

    def run(self, **changes: Any) -> Tensor:
        names = self.operator._schema.arguments
        arguments = {item.name: value for item, value in zip(names, self.arguments, strict=True)} | changes
        result: Tensor = self.operator(**arguments)
        return result.cpu()


def prepare_layer(case: LayerCase) -> Prepared:
    generator = torch.Generator().manual_seed(case.seed)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(low, high, shape, dtype=dtype, generator=generator)

    is_conv = case.kernel is not None
    shape = [case.outputs, case.channels // case.groups, *(case.kernel or ())]
    spatial = (case.height, case.width) if is_conv else (case.height,)
    x = integers(0, 256, case.batch, case.channels, *spatial)
    x = x.contiguous(memory_format=torch.channels_last) if is_conv else x.transpose(1, 2).contiguous()
    zero_point = shift = None
    if case.stored == "int8":
        stored = integers(-127, 128, *shape, dtype=torch.int8)
    else:
        stored = pack_int4(integers(0, 16, *shape))
        zero_point = integers(0, 16, case.outputs)
        if case.stored == "int4-shifted":
            shift = pack_shifts(integers(0, 4, case.channels))
    integer = reference.integer_weight(stored, zero_point, shift, shape, case.groups)
    geometry = [list(case.stride), list(case.padding), list(case.dilation)] if is_conv else []
    if is_conv:
        accumulator = reference.conv2d_accumulator(x, case.x_zero_point, integer, *geometry, case.groups)
    else:
        accumulator = reference.linear_accumulator(x, case.x_zero_point, integer)
    magnitude = 127.0 * 128 * max(1, integer[0].numel()) ** 0.5
    scale = (torch.rand(case.outputs, generator=generator) + 0.5) * 4 / magnitude
    bias = torch.randn(case.outputs, generator=generator) if case.bias else None
    embedding = None
    if case.embedding:
        embedding = torch.randn(case.batch, case.outputs, generator=generator).to(case.carrier)
    residual = torch.randn(accumulator.shape, generator=generator).to(case.carrier) if case.residual else None
    inv_scale = torch.rand(case.outputs, generator=generator) * 20 + 5 if case.requantize else None
    grid = [-7, -128, 127] if case.requantize else [0, 0, 0]
    dtype = torch.int8 if case.requantize else case.carrier
    wanted = reference.finish(
        accumulator, scale, bias, embedding, residual, case.silu, inv_scale, grid, 1 if is_conv else -1, dtype
    )
    padding, dilation = (case.padding, case.dilation) if is_conv else ((0, 0), (1, 1))
    table = cuda_weights.correction_table(integer, case.x_zero_point - 128, padding, dilation)
    if zero_point is None:
        weight = cuda_weights.kernel_weight(stored)
    else:
        weight = cuda_weights.kernel_packed_weight(stored, zero_point, shape)
    shifts = None if shift is None else cuda_weights.kernel_shifts(shift, case.channels, case.groups)
    signed = (x ^ 128).view(torch.int8)
    constants = (scale, table, None if zero_point is None else zero_point.to(torch.int8), shifts, bias, embedding)
    tensors = (signed, weight, *constants, inv_scale, residual)
    moved = tuple(None if item is None else item.to(case.device) for item in tensors)
    numbers = (grid, case.silu, shape)
    if is_conv:
        tail: tuple[Any, ...] = (*numbers, *geometry, case.groups, case.arguments, dtype)
        return Prepared(qdiff.cuda_conv2d.default, (*moved, *tail), wanted)
    return Prepared(qdiff.cuda_linear.default, (*moved, *numbers, "triton", case.arguments, dtype), wanted)


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """An attention over [batch, heads, ...] codes; mask is None, "bool", "float" or "row" (one for all queries)."""

    batch: int = 1
    heads: int = 2
    queries: int = 9
    keys: int = 11
    head: int = 8
    value_head: int = 8
    mask: str | None = None
    causal: bool = False
    bits: int = 8
    carrier: torch.dtype = torch.float32
    seed: int = 0
    tile: tuple[int, int] = (32, 32)
    device: str = "cpu"


@dataclass(frozen=True)
class PreparedAttention:
    """Arguments of the operator, the unsigned codes they stand for, and their scales."""

    arguments: tuple[Any, ...]
    codes: tuple[Tensor, Tensor, Tensor]
    zero_points: tuple[int, int, int]
    scales: tuple[float, float, float]
    mask: Tensor | None

    def real(self) -> tuple[Tensor, ...]:
        """q, k and v in real units, float64."""
        values = zip(self.codes, self.zero_points, self.scales, strict=True)
        return tuple((codes.double() - zero_point) * scale for codes, zero_point, scale in values)


def prepare_attention(case: AttentionCase, value: Tensor | None = None) -> PreparedAttention:
    """`value`: unsigned codes of v [batch, heads, keys, value_head] in place of random ones, with zero point 128."""
    generator = torch.Generator().manual_seed(case.seed)
    leading = (case.batch, case.heads)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, (*leading, *shape), dtype=torch.uint8, generator=generator)

    query, key = codes(case.queries, case.head), codes(case.keys, case.head)
    zero_points = (120, 131, 140 if value is None else 128)
    value = codes(case.keys, case.value_head) if value is None else value
    scales = (0.02, 0.03, 0.05)
    mask = None
    if case.mask == "float":
        mask = torch.randn(case.queries, case.keys, generator=generator)
    elif case.mask is not None:
        rows = (case.batch, 1, 1, case.keys) if case.mask == "row" else (case.queries, case.keys)
        mask = torch.rand(rows, generator=generator) > 0.4
        mask[..., 0] = True  # the reference has no value for a query without a key
    qmax = 2**case.bits - 1
    signed = [(item ^ 128).view(torch.int8).to(case.device) for item in (query, key, value)]
    arguments = (
        *signed,
        None if mask is None else mask.to(case.device),
        case.causal,
        scales[0] * scales[1] * case.head**-0.5,
        scales[2] / qmax,
        [item - 128 for item in zero_points],
        qmax,
        [*case.tile, 4, 1],
        case.carrier,
    )
    return PreparedAttention(arguments, (query, key, value), zero_points, scales, mask)
