"""Weights and corrections in the layout that the Triton kernels read. Plain torch, without data-dependent shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qdiff_fx.numerics.packing import unpack_int4, unpack_shifts

SIGNED_OFFSET = 128
"""Codes of the plan are unsigned; the kernels read them less this, as int8."""


def kernel_weight(weight: Tensor) -> Tensor:
    """[O, taps * C / groups] int8, channels fastest, of an int8 weight [O, C / groups, ...]; 1x1 weights are views."""
    return weight.reshape(weight.shape[0], weight.shape[1], -1).transpose(1, 2).reshape(weight.shape[0], -1)


def kernel_packed_weight(packed: Tensor, zero_point: Tensor, shape: Sequence[int]) -> Tensor:
    """[O, taps * half] int8 of 4-bit codes: channel j of a tap in the low nibble, channel j + half in the high one.

    half is C / groups / 2, rounded up; the missing channel of an odd count holds the zero point, which stands for 0.
    """
    outputs, depth = shape[:2]
    codes = unpack_int4(packed, shape).reshape(outputs, depth, -1).transpose(1, 2)
    if depth % 2:
        filler = zero_point.view(outputs, 1, 1).expand(-1, codes.shape[1], 1)
        codes = torch.cat([codes, filler.to(codes.dtype)], dim=2)
    low, high = codes.chunk(2, dim=2)
    return (low | (high << 4)).reshape(outputs, -1).contiguous().view(torch.int8)


def kernel_shifts(packed: Tensor, channels: int, groups: int) -> Tensor:
    """[groups * 2 * half] int8 channel shifts in the order of `kernel_packed_weight`."""
    shifts = unpack_shifts(packed, channels).view(groups, -1)
    return functional.pad(shifts, (0, shifts.shape[1] % 2)).reshape(-1).to(torch.int8)


def border_limit(padding: int, dilation: int) -> int:
    """One more than the taps that a border can cut off on one side."""
    return -(-padding // dilation) + 1


def correction_table(
    weight: Tensor, x_zero_point: int, padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1)
) -> Tensor:
    """[patterns, O] int32: x_zero_point times the sum of the weights that a pixel sees.

    A pattern says how many taps fall before and behind the image, vertically and horizontally:
    ((before_y * limit_y + behind_y) * limit_x + before_x) * limit_x + behind_x.

    Args:
      weight: [O, C / groups, kH, kW] or [O, C] int8, zero point folded.
      x_zero_point: of the signed codes.
    """
    taps = weight.to(torch.int32).sum(1, dtype=torch.int32)
    taps = taps.view(weight.shape[0], 1, 1) if weight.ndim == 2 else taps
    _, height, width = taps.shape
    vertical = _visible(height, border_limit(padding[0], dilation[0]), weight.device)
    horizontal = _visible(width, border_limit(padding[1], dilation[1]), weight.device)
    # Sums of at most kH kW terms, by broadcasting: integer matrix products exist on no GPU.
    rows = (vertical[:, None, :, None] * taps).sum(2, dtype=torch.int32)
    table = (rows[:, None] * horizontal[None, :, None, :]).sum(3, dtype=torch.int32)
    return (table * x_zero_point).reshape(-1, weight.shape[0]).contiguous()


def _visible(taps: int, limit: int, device: torch.device) -> Tensor:
    """[limit * limit, taps] int32 of 0 and 1: taps that lie in the image, by how many are cut off on either side."""
    index = torch.arange(taps, dtype=torch.int32, device=device)
    cut = torch.arange(limit, dtype=torch.int32, device=device)
    before, behind = index >= cut[:, None], index < taps - cut[:, None]
    return (before[:, None] & behind[None, :]).reshape(-1, taps).to(torch.int32)
