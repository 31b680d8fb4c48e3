"""Group normalisation of images that lie channels_last, as compilers make the most of it.

inductor reduces a group over its pixels and its channels at once: of a vector's 16 lanes as many work as a group has
channels, 3 or 4 where 96 or 128 channels have 32 groups. Here every channel is reduced alone, all lanes at work, and
the channels of a group are joined afterwards (T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise
algorithm for computing sample variances", 1979). Deviations are taken from the first pixel of each channel, so that a
mean far larger than the spread costs no digits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`torch.nn.functional.group_norm` of `x` [B, C, ...]: torch's kernel; compiled, channel by channel."""
    if torch.compiler.is_compiling():
        return group_norm_by_channel(x, groups, weight, bias, eps)
    return torch.nn.functional.group_norm(x, groups, weight, bias, eps)


def group_norm_by_channel(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The same function, reduced in float32 over every channel and then over the channels of each group."""
    batch, channels = x.shape[:2]
    grouped = (batch, groups, channels // groups)
    space, pixels = list(range(2, x.dim())), math.prod(x.shape[2:])
    wide = x.float()
    first = wide
    for axis in space:
        first = first.narrow(axis, 0, 1)
    deviation = wide - first
    total, squares = deviation.sum(space), deviation.square().sum(space)
    mean = (total / pixels + first.reshape(batch, channels)).reshape(grouped)
    within = (squares - total * total / pixels).reshape(grouped).sum(2, keepdim=True) / pixels
    center = mean.mean(2, keepdim=True)
    variance = (within + (mean - center).square().sum(2, keepdim=True)) / grouped[2]
    scale = (variance.clamp_min(0) + eps).rsqrt().expand(grouped).reshape(batch, channels)
    if weight is not None:
        scale = scale * weight.float()
    offset = -center.expand(grouped).reshape(batch, channels) * scale
    if bias is not None:
        offset = offset + bias.float()
    # What is viewed with strides has to be written down first: it is computed once a channel, not once a pixel.
    scale, offset = (item.contiguous().as_strided((batch, channels), (channels, 1)) for item in (scale, offset))
    shape = (batch, channels, *(1 for _ in space))
    return (wide * scale.reshape(shape) + offset.reshape(shape)).to(x.dtype)
