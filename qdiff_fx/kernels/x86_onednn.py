"""oneDNN int8 kernels for x86 CPUs: operators over prepacked weights.

`qdiff::x86_conv2d` and `qdiff::x86_linear` wrap `onednn::qconv_pointwise` and `onednn::qlinear_pointwise`. They are
operators of our own because inductor's lowering of the latter demands a frozen weight, and because oneDNN answers an
empty [B, N, C] with a two-dimensional result. They are registered with plain `Library.impl`: `custom_op` costs 50 us a
call more. Every line in them is paid for by each layer of each step: small layers take no longer than their call.

Traps that this module keeps out of the rest: activations must be uint8, weight zero points are ignored (there are
none: ours are folded). On CPUs without VNNI 16-bit partial sums saturate, which is wrong and not merely slow: x86.py
asks for known answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qdiff_fx.kernels.empty_image import empty_image

_LIBRARY: Any = torch.library.Library("qdiff", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "x86_conv2d(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, float x_scale, int x_zero_point, "
    "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, ScalarType output_dtype) -> Tensor"
)
_LIBRARY.define(
    "x86_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, float x_scale, int x_zero_point, "
    "int output_features, ScalarType output_dtype) -> Tensor"
)


def prepack_conv2d(
    weight: Tensor,
    weight_scale: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_shape: Sequence[int] | None,
) -> Tensor:
    """`weight` [O, C / groups, kH, kW] int8 in oneDNN's blocked layout: opaque, cannot be copied or saved.

    Args:
      x_shape: [B, C, H, W] that the blocking is chosen for. Any shape runs with it; one that wants another blocking
        reorders the weight on every call.
    """
    # x_scale and x_zero_point only enter the layout query; values do not matter, zero or not does.
    packed: Tensor = torch.ops.onednn.qconv_prepack(
        weight.contiguous(),
        weight_scale,
        1.0,
        1,
        list(stride),
        list(padding),
        list(dilation),
        groups,
        None if x_shape is None else list(x_shape),
    )
    return packed


def prepack_linear(weight: Tensor) -> Tensor:
    """`weight` [O, C] int8 in oneDNN's blocked layout: opaque, cannot be copied or saved."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return packed


def _conv2d(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
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
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    result: Tensor = torch.ops.onednn.qconv_pointwise.default(
        x,
        x_scale,
        x_zero_point,
        packed,
        weight_scale,
        weight_scale,  # in place of weight zero points, which oneDNN does not read
        bias,
        stride,
        padding,
        dilation,
        groups,
        1.0,
        0,
        output_dtype,
        "none",
        [],
        "",
    )
    return result


def _conv2d_fake(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
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


def _linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    output_features: int,
    output_dtype: torch.dtype,
) -> Tensor:
    if x.numel() == 0:
        return torch.empty((*x.shape[:-1], output_features), dtype=output_dtype)
    result: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        x if x.is_contiguous() else x.contiguous(),
        x_scale,
        x_zero_point,
        packed,
        weight_scale,
        weight_scale,  # in place of weight zero points, which oneDNN does not read
        bias,
        1.0,
        0,
        output_dtype,
        "none",
        [],
        "",
    )
    return result


def _linear_fake(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    output_features: int,
    output_dtype: torch.dtype,
) -> Tensor:
    return torch.empty((*x.shape[:-1], output_features), dtype=output_dtype, device=x.device)


# A packed weight is a mkldnn tensor, which has a dispatch key of its own.
for _key in ("CPU", "MkldnnCPU"):
    _LIBRARY.impl("x86_conv2d", _conv2d, _key)
    _LIBRARY.impl("x86_linear", _linear, _key)
torch.library.register_fake("qdiff::x86_conv2d", _conv2d_fake, lib=_LIBRARY)
torch.library.register_fake("qdiff::x86_linear", _linear_fake, lib=_LIBRARY)
