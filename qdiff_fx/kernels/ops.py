"""The qdiff:: operators: functional, opaque to compilers, with fake kernels. `reference.py` defines what they compute.

A weight argument comes in one of two stored forms, told apart by dtype: int8 [O, C_in / groups, ...] with the zero
point folded, or uint8 [bytes] of 4-bit codes two to a byte, with `weight_zero_point` [O] uint8 and `channel_shift`
(packed, two bits a channel) beside it. `weight_shape` is the logical shape in both. Outputs of conv2d are
channels_last, whatever the input's strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qdiff_fx.kernels import reference
from qdiff_fx.kernels.empty_image import empty_image


@torch.library.custom_op("qdiff::quantize", mutates_args=())
def quantize(x: Tensor, inv_scale: Tensor, zero_point: int, qmin: int, qmax: int, channel_axis: int) -> Tensor:
    """uint8 codes of `x` [..., C, ...]; `inv_scale` is float32, [] or [C] along `channel_axis`."""
    return reference.quantize_activation(x, inv_scale, zero_point, qmin, qmax, channel_axis)


@quantize.register_fake
def _(x: Tensor, inv_scale: Tensor, zero_point: int, qmin: int, qmax: int, channel_axis: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@torch.library.custom_op("qdiff::conv2d", mutates_args=())
def conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    channel_shift: Tensor | None,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_dtype: torch.dtype,
) -> Tensor:
    """acc * s_x * s_w[o] + bias[o] for x [B, C, H, W] uint8 codes; [B, O, H', W'] channels_last."""
    integer = reference.integer_weight(weight, weight_zero_point, channel_shift, weight_shape, groups)
    accumulator = reference.conv2d_accumulator(x, x_zero_point, integer, stride, padding, dilation, groups)
    result = reference.rescale(accumulator, x_scale, weight_scale, bias, 1, output_dtype)
    return result.contiguous(memory_format=torch.channels_last)


@conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    channel_shift: Tensor | None,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_dtype: torch.dtype,
) -> Tensor:
    return empty_image(x, weight_shape, stride, padding, dilation, output_dtype)


@torch.library.custom_op("qdiff::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    channel_shift: Tensor | None,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    weight_shape: Sequence[int],
    output_dtype: torch.dtype,
) -> Tensor:
    """acc * s_x * s_w[o] + bias[o] for x [..., C] uint8 codes; [..., O] contiguous."""
    integer = reference.integer_weight(weight, weight_zero_point, channel_shift, weight_shape, 1)
    accumulator = reference.linear_accumulator(x, x_zero_point, integer)
    return reference.rescale(accumulator, x_scale, weight_scale, bias, -1, output_dtype).contiguous()


@linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    channel_shift: Tensor | None,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    weight_shape: Sequence[int],
    output_dtype: torch.dtype,
) -> Tensor:
    return torch.empty((*x.shape[:-1], weight_shape[0]), dtype=output_dtype, device=x.device)


@torch.library.custom_op("qdiff::dequantize_weight", mutates_args=())
def dequantize_weight(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_shape: Sequence[int],
    output_dtype: torch.dtype,
) -> Tensor:
    """The weight in real units, for layers whose input stays in the carrier type."""
    integer = reference.integer_weight(weight, weight_zero_point, None, weight_shape, 1)
    return reference.rescale(integer, 1.0, weight_scale, None, 0, output_dtype)


@dequantize_weight.register_fake
def _(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_shape: Sequence[int],
    output_dtype: torch.dtype,
) -> Tensor:
    return torch.empty(list(weight_shape), dtype=output_dtype, device=weight.device)


@torch.library.custom_op("qdiff::attention", mutates_args=())
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
    """softmax(scale q k^T + mask) v on quantized operands and probabilities; [..., L, D] contiguous.

    `operand_scales` and `operand_zero_points` are those of q, k and v, empty where they stay in the carrier type;
    `softmax_bits` is 0 where the probabilities do.
    """
    return reference.attention(
        query,
        key,
        value,
        mask,
        is_causal,
        scale,
        operand_scales,
        operand_zero_points,
        operand_bits,
        softmax_bits,
    ).contiguous()


@attention.register_fake
def _(
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
    return torch.empty((*query.shape[:-1], value.shape[-1]), dtype=value.dtype, device=value.device)
