"""What every convolution's fake kernel returns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_image(
    x: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The result of convolving `x` [B, C, H, W] by a weight [O, C / groups, kH, kW], channels last, not filled in."""
    spatial = [
        (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight_shape[2 + axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    ]
    shape = (x.shape[0], weight_shape[0], *spatial)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
