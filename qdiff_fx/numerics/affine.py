"""Affine quantization of activations: the only home of round, clamp and scale.

One rule holds everywhere, in every backend and in the simulation: codes are made by multiplying with the float32
reciprocal of the step, never by dividing (the two differ in 13 % of half steps), and all arithmetic is float32.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Integer, Num
from torch import Tensor

from qdiff_fx.errors import QuantSpecError
from qdiff_fx.numerics.spec import QuantSpec

MINIMUM_SCALE = 2.0**-100
"""Smallest scale that is handed out: its reciprocal, and that of any sane multiple of it, is a normal float32."""

MAXIMUM_SPAN = torch.finfo(torch.float32).max * (1.0 - 2.0**-20)
"""Largest dequantized value of a grid; the margin keeps a rounded-up scale times its levels finite."""


class QParams(NamedTuple):
    """Where a grid lies on the real line: code q stands for (q - zero_point) * scale.

    Attributes:
      scale: [] or [C], float32, real units per integer step, > 0.
      zero_point: shape of `scale`, int32, in [qmin, qmax]: the code of real zero.
    """

    scale: Tensor
    zero_point: Tensor


def reciprocal(scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """fp32(1 / scale), the inv_scale that every backend multiplies with."""
    return 1.0 / scale.to(torch.float32)


def quantize(
    x: Float[Tensor, "..."],
    inv_scale: Float[Tensor, "..."],
    zero_point: int | Num[Tensor, "..."],
    qmin: int,
    qmax: int,
) -> Float[Tensor, "..."]:
    """Integer codes of `x` as float32: clamp(round_half_even(float32(x) * inv_scale) + zero_point, qmin, qmax).

    Plain ATen, so that a compiler can fuse it into whatever made `x`. Infinity saturates, NaN stays NaN.

    Args:
      x: any shape and floating dtype, real units.
      inv_scale: [] or broadcastable to `x`, float32, from `reciprocal`.
      zero_point: integer or tensor broadcastable to `x`, in [qmin, qmax].
      qmin, qmax: lowest and highest code.
    """
    return torch.clamp(torch.round(x.to(torch.float32) * inv_scale) + zero_point, qmin, qmax)


def dequantize(
    codes: Num[Tensor, "..."], scale: Float[Tensor, "..."], zero_point: int | Num[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Real values of `codes`: (codes - zero_point) * scale, in the dtype of `scale` (float32).

    The difference is exact: codes and zero points are below 2^24.
    """
    return (codes.to(torch.float32) - zero_point) * scale


def along_axis(values: Num[Tensor, "..."], dimensions: int, axis: int = 0) -> Num[Tensor, "..."]:
    """`values` [C] viewed so that it broadcasts along `axis` of a tensor of that many dimensions; others unchanged."""
    if values.ndim != 1:
        return values
    shape = [1] * dimensions
    shape[axis] = -1
    return values.view(shape)


class _FakeQuantize(torch.autograd.Function):
    """Round to the grid and back; gradients by Esser et al. 2020 (LSQ), eq. 3 and 5."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero_point: Tensor | int, qmin: int, qmax: int) -> Tensor:
        inv_step = reciprocal(step)
        level = quantize(x, inv_step, zero_point, qmin, qmax) - zero_point
        steps = x.to(torch.float32) * inv_step
        lowest, highest = qmin - zero_point, qmax - zero_point
        step_error = passes = None
        # What the backward pass needs is made here, while the operands are in the cache.
        if ctx.needs_input_grad[1]:
            step_error = torch.where((steps > lowest) & (steps < highest), level - steps, level)
        if ctx.needs_input_grad[0]:
            # Closed interval, as torch.clamp has it: an exact zero under zero point 0 keeps its gradient.
            passes = (steps >= lowest) & (steps <= highest)
        ctx.save_for_backward(step_error, passes)
        ctx.step_shape, ctx.step_dtype = step.shape, step.dtype
        return (level * step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        step_error, passes = ctx.saved_tensors
        step_gradient = None
        if step_error is not None:
            products = gradient.to(torch.float32) * step_error
            step_gradient = products.sum_to_size(ctx.step_shape).to(ctx.step_dtype)
        return None if passes is None else gradient * passes, step_gradient, None, None, None


def fake_quantize(
    x: Float[Tensor, "..."],
    scale: Float[Tensor, "..."],
    zero_point: int | Num[Tensor, "..."],
    spec: QuantSpec,
    *,
    channel_factor: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """Round `x` to the integer grid and map it back, keeping its dtype.

    The value is dequantize(quantize(x, reciprocal(step), ...), step, ...) bit for bit, where step = fp32(scale *
    channel_factor). Gradients: to `x` straight through, zero where it saturates; to `scale` (and `channel_factor`) by
    LSQ (Esser et al. 2020, eq. 3): round(v) - v inside, the saturated level outside, with v = x / step. Departure:
    without the 1 / sqrt(N * qmax) gradient scale, which is the optimiser's business.

    Args:
      x: [B, C, H, W], [B, N, C] or a weight [C_out, C_in, kH, kW], real units.
      scale: [] or broadcastable to `x`; [C] of a per-channel spec runs along axis 0; real units per step, > 0.
      zero_point: integer in [qmin, qmax], shape of `scale`.
      spec: the grid.
      channel_factor: broadcastable to `x`, > 0: the step of a channel is scale * channel_factor.
    """
    if spec.per_channel:
        scale = along_axis(scale, x.ndim)
        zero_point = along_axis(zero_point, x.ndim) if isinstance(zero_point, Tensor) else zero_point
    step = scale.to(torch.float32) if channel_factor is None else scale.to(torch.float32) * channel_factor
    if torch.is_grad_enabled() and (x.requires_grad or step.requires_grad):
        result: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
            x, step, zero_point, spec.qmin, spec.qmax
        )
        return result
    codes = quantize(x, reciprocal(step), zero_point, spec.qmin, spec.qmax)
    return dequantize(codes, step, zero_point).to(x.dtype)


def qparams_from_range(minimum: Float[Tensor, "*c"], maximum: Float[Tensor, "*c"], spec: QuantSpec) -> QParams:
    """The finest grid of `spec` that covers [minimum, maximum] and 0; real zero has a code of its own.

    Symmetric grids cover max(|minimum|, |maximum|); unsigned symmetric ones cover maximum (negative values saturate).
    An all-zero range gets scale 1. Scales lie between 2^-100 and about the largest float32 / levels, so that neither
    1 / scale nor a dequantized value overflows, whatever the range.

    Args:
      minimum, maximum: [] or [C], real units.
      spec: the grid.

    Raises:
      QuantSpecError: if a bound is NaN or infinite, or minimum > maximum.
    """
    if not bool((torch.isfinite(minimum) & torch.isfinite(maximum) & (minimum <= maximum)).all()):
        raise QuantSpecError(f"range [{minimum}, {maximum}]: want finite bounds, minimum <= maximum; observe again")
    # float64: the span of a range of huge values would overflow.
    lowest, highest = minimum.to(torch.float64).clamp(max=0.0), maximum.to(torch.float64).clamp(min=0.0)
    levels = max(spec.qmax, -spec.qmin) if spec.symmetric else spec.qmax - spec.qmin
    if not spec.symmetric:
        step = (highest - lowest) / levels
    else:
        step = (torch.maximum(-lowest, highest) if spec.signed else highest) / spec.qmax
    step = torch.where(step > 0, step, torch.ones_like(step))
    scale = step.clamp(MINIMUM_SCALE, MAXIMUM_SPAN / levels).to(torch.float32)
    if spec.symmetric:
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32))
    # The same product as in `quantize`: the minimum gets the lowest code exactly.
    zero_point = spec.qmin - torch.round(lowest.to(torch.float32) * reciprocal(scale))
    return QParams(scale, zero_point.clamp(spec.qmin, spec.qmax).to(torch.int32))


def check_qparams(scale: Tensor, zero_point: Integer[Tensor, "..."], spec: QuantSpec, name: str) -> None:
    """Raise QuantSpecError, naming the layer `name`, unless the parameters are usable on the grid of `spec`.

    The scale and its float32 reciprocal must be positive and finite, the zero point in [qmin, qmax] (0 if symmetric).
    """
    usable = torch.isfinite(scale) & (scale > 0) & torch.isfinite(reciprocal(scale))
    if not bool(usable.all()):
        raise QuantSpecError(
            f"{name}: scale {_first(scale, ~usable)}: want positive, finite, with a finite reciprocal; calibrate again"
        )
    lowest, highest = (0, 0) if spec.symmetric else (spec.qmin, spec.qmax)
    usable = (zero_point >= lowest) & (zero_point <= highest)
    if not bool(usable.all()):
        raise QuantSpecError(
            f"{name}: zero point {_first(zero_point, ~usable)}: want an integer in [{lowest}, {highest}] "
            f"({spec.bits} bits, {'symmetric' if spec.symmetric else 'asymmetric'}); calibrate again"
        )


def _first(values: Tensor, where: Tensor) -> float:
    """The first of `values` where `where` holds, for a message."""
    return float(values.expand(where.shape)[where].flatten()[0])
