"""Group normalisation of images that lie channels_last, as compilers make the most of it.

inductor reduces a group over its pixels and its channels at once: of a vector's 16 lanes as many work as a group has
channels, 3 or 4 where 96 or 128 channels have 32 groups. Here every channel is reduced alone, all lanes at work, and
the channels of a group are joined afterwards (T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise
algorithm for computing sample variances", 1979). Deviations are taken from the middle pixel of each channel, so that a
mean far larger than the spread costs the variance no digits; a middle pixel far off the others does, a relative error
of up to the number of pixels times the last bit.
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
    """The same function, reduced in float32 or wider over every channel and then over the channels of each group."""
    batch, channels = x.shape[:2]
    grouped, flat = (batch, groups, channels // groups), (batch, channels)
    space, pixels = list(range(2, x.dim())), math.prod(x.shape[2:])
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    middle = wide
    for axis in space:
        middle = middle.narrow(axis, x.shape[axis] // 2, 1)
    deviation = wide - middle
    total, squares = deviation.sum(space), deviation.square().sum(space)
    mean = (total / pixels + middle.reshape(flat)).reshape(grouped)
    within = (squares - total * total / pixels).reshape(grouped).sum(2, keepdim=True) / pixels
    center = mean.mean(2, keepdim=True)
    variance = (within + (mean - center).square().sum(2, keepdim=True)) / grouped[2]
    scale = (variance.clamp_min(0) + eps).rsqrt().expand(grouped).reshape(flat)
    if weight is not None:
        scale = scale * weight.to(wide.dtype)
    # as_strided makes inductor store what there is once a channel, instead of working it out again for every pixel.
    scale, center = (
        item.contiguous().as_strided(flat, (channels, 1)) for item in (scale, center.expand(grouped).reshape(flat))
    )
    shape = (batch, channels, *(1 for _ in space))
    result = (wide - center.reshape(shape)) * scale.reshape(shape)
    if bias is not None:
        result = result + bias.to(wide.dtype).reshape(1, *shape[1:])
    return result.to(x.dtype)
