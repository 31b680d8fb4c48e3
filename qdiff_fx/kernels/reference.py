"""The exact definition of every qdiff:: operator, in plain torch. Slow on purpose: clarity is its job.

Accumulators are computed in float64, where every int32 value and every partial sum of one is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qdiff_fx.kernels.backend import Backend
from qdiff_fx.numerics.affine import along_axis, fake_quantize, quantize
from qdiff_fx.numerics.attention import attend
from qdiff_fx.numerics.packing import unpack_int4, unpack_shifts
from qdiff_fx.numerics.spec import QuantSpec
from qdiff_fx.numerics.weights import fold_codes

REFERENCE = Backend(name="reference", unavailable=lambda device: None)

PACKED_BITS = 4
"""Weights of so many bits or fewer are stored two to a byte; wider ones as int8, zero point folded."""


def quantize_activation(
    x: Tensor,
    inv_scale: Tensor,
    zero_point: int,
    qmin: int,
    qmax: int,
    channel_axis: int,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """Codes of `x`, uint8 unless the grid is a signed one; `inv_scale` is [] or [C] along `channel_axis`."""
    return quantize(x, along_axis(inv_scale, x.ndim, channel_axis), zero_point, qmin, qmax).to(dtype)


def integer_weight(
    weight: Tensor, zero_point: Tensor | None, channel_shift: Tensor | None, shape: Sequence[int], groups: int
) -> Tensor:
    """The int8 weight [O, C_in / groups, ...] that kernels read, from its stored form."""
    if weight.dtype == torch.int8:
        return weight
    codes = unpack_int4(weight, shape)
    shift = None if channel_shift is None else unpack_shifts(channel_shift, shape[1] * groups)
    assert zero_point is not None
    return fold_codes(codes, zero_point, shift, groups=groups, validate=False)


def conv2d_accumulator(
    x: Tensor,
    x_zero_point: int,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """sum (q_x - z_x) * w in int32; padding stands for real zero, so it adds nothing.

    Args:
      x: [B, C, H, W] uint8 codes.
      weight: [O, C / groups, kH, kW] int8.
    """
    centred = x.to(torch.float64) - x_zero_point
    return functional.conv2d(
        centred, weight.to(torch.float64), None, list(stride), list(padding), list(dilation), groups
    ).to(torch.int32)


def linear_accumulator(x: Tensor, x_zero_point: int, weight: Tensor) -> Tensor:
    """sum (q_x - z_x) * w in int32 for x [..., C] uint8 codes and weight [O, C] int8."""
    return functional.linear(x.to(torch.float64) - x_zero_point, weight.to(torch.float64)).to(torch.int32)


def rescale(
    accumulator: Tensor, x_scale: float, weight_scale: Tensor, bias: Tensor | None, axis: int, dtype: torch.dtype
) -> Tensor:
    """acc * (s_x * s_w[o]) + bias[o] in float32, cast to `dtype`."""
    result = accumulator.to(torch.float32) * along_axis(weight_scale * x_scale, accumulator.ndim, axis)
    if bias is not None:
        result = result + along_axis(bias.to(torch.float32), accumulator.ndim, axis)
    return result.to(dtype)


def finish(
    accumulator: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    embedding: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    inv_scale: Tensor | None,
    requantize: Sequence[int],
    axis: int,
    dtype: torch.dtype,
) -> Tensor:
    """What fused kernels make of an accumulator, in float32 and in this order, cast to `dtype`.

    Args:
      accumulator: int32, output channels along `axis`.
      scale, bias, inv_scale: float32 [O].
      embedding: [B, O], added to every position.
      residual: shape of the accumulator.
      requantize: zero point, qmin, qmax of the codes that are returned where `inv_scale` is given.
    """
    rank = accumulator.ndim
    value = accumulator.to(torch.float32) * along_axis(scale, rank, axis)
    if bias is not None:
        value = value + along_axis(bias, rank, axis)
    if embedding is not None:
        value = value + embedding.to(torch.float32).view(*embedding.shape, *[1] * (rank - 2))
    if residual is not None:
        value = value + residual.to(torch.float32)
    if silu:
        value = functional.silu(value)
    if inv_scale is not None:
        value = quantize(value, along_axis(inv_scale, rank, axis), *requantize)
    return value.to(dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    operand_scales: Sequence[float],
    operand_zero_points: Sequence[int],
    operand_bits: int,
    softmax_bits: int,
) -> Tensor:
    """Attention over simulated integers: operands and probabilities lie on their grids, products run in the carrier."""
    operands = [query, key, value]
    if operand_scales:
        spec = QuantSpec(bits=operand_bits)
        operands = [
            fake_quantize(operand, torch.tensor(step, dtype=torch.float32, device=operand.device), zero_point, spec)
            for operand, step, zero_point in zip(operands, operand_scales, operand_zero_points, strict=True)
        ]
    query, key, value = operands
    if not softmax_bits:
        return functional.scaled_dot_product_attention(query, key, value, mask, 0.0, is_causal, scale=scale)
    return attend(query, key, value, mask, is_causal, scale, QuantSpec(bits=softmax_bits, symmetric=True))
