"""Clipping ranges by search: the published 80-candidate shrink of min/max, vectorised over channels."""

import torch
from jaxtyping import Float
from torch import Tensor

from qdiff_fx.errors import QuantSpecError
from qdiff_fx.numerics.affine import QParams, qparams_from_range, reciprocal
from qdiff_fx.numerics.spec import QuantSpec

_LARGEST_SHRINK = 0.8
"""The last candidate's distance from the full range in the published search, in steps of 0.01."""

_BLOCK_VALUES = 2**18
"""Values a block: temporaries of 1 MiB stay in the cache, and memory is bounded whatever the weight."""


@torch.no_grad()
def search_mse(
    x: Float[Tensor, "*C N"],
    spec: QuantSpec,
    *,
    candidates: int = 80,
    exponent: float = 2.4,
    minimum: Float[Tensor, "*C"] | None = None,
    maximum: Float[Tensor, "*C"] | None = None,
    extra: QParams | None = None,
) -> QParams:
    """The grid with the least mean |x - fake_quantize(x)|^exponent among shrinks of the range, by row.

    Candidate i covers (1 - 0.8 * i / candidates) * [minimum, maximum]; with 80 these are the steps of 0.01 of the
    search that Q-Diffusion (Li et al. 2023) publishes. Candidate 0 is min-max and ties keep the earlier one, so the
    result is never worse than min-max. Departures: all rows at once; errors are measured in min-max steps, so that
    neither huge nor tiny values overflow or vanish (the minimum is the same); ranges include 0, so all-zero and
    one-sided rows are ordinary.

    Args:
      x: [C, N] with a grid for each row, or [N] with one grid; real units, finite.
      spec: the grid.
      candidates: number of ranges tried, >= 1.
      exponent: of the error.
      minimum, maximum: [C] or []: exact range, where `x` is only a sample of the data; default: of `x`.
      extra: one more grid to try, [C] or []: with that of an unsplit tensor, a part of it never gets a worse one.

    Raises:
      QuantSpecError: if `x` is empty, not 1-d or 2-d, or holds NaN or infinity.
    """
    if x.ndim not in (1, 2) or x.numel() == 0 or candidates < 1:
        raise QuantSpecError(
            f"x {tuple(x.shape)}, candidates={candidates}: want values in [C, N] or [N], candidates >= 1"
        )
    rows = x.detach().reshape(-1, x.shape[-1])
    lowest = rows.amin(dim=1) if minimum is None else minimum.reshape(-1)
    highest = rows.amax(dim=1) if maximum is None else maximum.reshape(-1)
    steps = [1.0 - _LARGEST_SHRINK * index / candidates for index in range(candidates)]
    shrinks = torch.tensor(steps, dtype=torch.float32, device=rows.device)[:, None]
    # One call for all candidates: 80 small ones cost more than the errors of a narrow layer.
    scales, zero_points = qparams_from_range(
        lowest.to(torch.float32) * shrinks, highest.to(torch.float32) * shrinks, spec
    )
    if extra is not None:
        scales = torch.cat([scales, extra.scale.reshape(1, -1)])
        zero_points = torch.cat([zero_points, extra.zero_point.reshape(1, -1)])
    best = _errors(rows, scales, zero_points, spec, exponent).argmin(dim=0, keepdim=True)
    scale = scales.gather(0, best).reshape(x.shape[:-1])
    return QParams(scale, zero_points.gather(0, best).reshape(x.shape[:-1]))


def _errors(rows: Tensor, scales: Tensor, zero_points: Tensor, spec: QuantSpec, exponent: float) -> Tensor:
    """Sums of |x - q|^exponent [K, C] in min-max steps, for rows [C, N] and the grids [K, C] of K candidates."""
    channels, count = rows.shape
    width = min(count, _BLOCK_VALUES)
    height = max(1, _BLOCK_VALUES // width)
    inv_scales, offsets, unit = reciprocal(scales), zero_points.to(torch.float32), reciprocal(scales[0])
    errors = torch.zeros(scales.shape, dtype=torch.float64, device=rows.device)
    for row in range(0, channels, height):
        part = slice(row, row + height)
        for column in range(0, count, width):
            block = rows[part, column : column + width].to(torch.float32)
            # A narrow layer's candidates share a block: 80 small calls would cost more than the arithmetic.
            together = max(1, _BLOCK_VALUES // block.numel())
            for first in range(0, scales.shape[0], together):
                some = slice(first, first + together)
                # quantize() and dequantize() of numerics.affine, operation by operation, in one buffer.
                scale, offset = scales[some, part, None], offsets[some, part, None]
                distance = block * inv_scales[some, part, None]
                distance.round_().add_(offset).clamp_(spec.qmin, spec.qmax).sub_(offset).mul_(scale)
                distance.sub_(block).abs_().mul_(unit[part, None])
                # exp and log are vectorised, pow is not; log(0) is -inf and comes back as 0.
                errors[some, part] += distance.log_().mul_(exponent).exp_().sum(dim=-1)
    return errors
