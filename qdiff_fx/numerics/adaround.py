"""Learned rounding: the relaxed variable h(V) between floor and ceiling, and what drives it to 0 or 1.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization" (AdaRound), equations 21 to 24.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from qdiff_fx.numerics.affine import along_axis, reciprocal
from qdiff_fx.numerics.spec import QuantSpec
from qdiff_fx.numerics.weights import grid_weight, input_channel_multiplier

ZETA, GAMMA = 1.1, -0.1
"""Stretch of the rectified sigmoid beyond [0, 1], so that 0 and 1 are reached at finite V."""

_EDGE = 1e-4
"""h of exactly 0 or 1 has no finite V with a gradient; the published code divides by zero there instead."""


class RoundingGrid(NamedTuple):
    """The two neighbours on the grid of every weight.

    Attributes:
      low: real value of the lower neighbour, float32.
      gap: distance to the upper one in real units; 0 where the grid ends, so that rounding has no effect.
      fraction: where between the two the weight lies, in [0, 1].
    """

    low: Tensor
    gap: Tensor
    fraction: Tensor


@torch.no_grad()
def rounding_grid(
    weight: Float[Tensor, "O I *k"],
    scale: Float[Tensor, "..."],
    zero_point: Integer[Tensor, "..."],
    spec: QuantSpec,
    *,
    channel_factor: Float[Tensor, " C_in"] | None = None,
    channel_shift: Integer[Tensor, " C_in"] | None = None,
    groups: int = 1,
) -> RoundingGrid:
    """Both neighbours of each weight; low + gap is the weight that `weight_codes` with round_up stands for.

    Arguments as in `qdiff_fx.numerics.weights.weight_codes`.
    """
    seen = grid_weight(weight, channel_factor=channel_factor, channel_shift=channel_shift, groups=groups)
    steps = seen * along_axis(reciprocal(scale), weight.ndim)
    offset = along_axis(zero_point, weight.ndim)
    lowest, highest = spec.qmin - offset, spec.qmax - offset
    floor = torch.floor(steps)
    inside = (floor >= lowest) & (floor < highest)
    step = along_axis(scale.to(torch.float32), weight.ndim).expand(weight.shape)
    multiplier = input_channel_multiplier(
        weight.shape, channel_factor=channel_factor, channel_shift=channel_shift, groups=groups
    )
    if multiplier is not None:
        step = step * reciprocal(multiplier)
    return RoundingGrid(torch.clamp(floor, lowest, highest) * step, step * inside, steps - floor)


def soft_rounding(variable: Float[Tensor, "*n"], *, out: Float[Tensor, "*n"] | None = None) -> Float[Tensor, "*n"]:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1): 0 rounds down, 1 up (equation 23).

    Args:
      variable: V.
      out: where the result goes; without gradient then. Fresh memory costs more than the arithmetic.
    """
    if out is None:
        return torch.clamp(torch.sigmoid(variable) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)
    return torch.sigmoid(variable, out=out).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0.0, 1.0)


def initial_variable(fraction: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The V with h(V) = fraction: learning starts at the full-precision weight.

    Args:
      fraction: in [0, 1]; kept 1e-4 away from both ends.
    """
    return torch.logit((fraction.clamp(_EDGE, 1.0 - _EDGE) - GAMMA) / (ZETA - GAMMA))


def hard_rounding(variable: Float[Tensor, "*n"]) -> Bool[Tensor, "*n"]:
    """Whether the learned decision is to round up: h(V) >= 1/2."""
    return variable >= 0.0


def rounding_penalty(rounding: Float[Tensor, " n"], beta: float) -> Float[Tensor, ""]:
    """sum (1 - |2 h - 1|^beta): 0 when every h is 0 or 1 (equation 24)."""
    return (1.0 - (2.0 * rounding - 1.0).abs().pow(beta)).sum()


def rounding_gradient(
    variable: Float[Tensor, " n"],
    weight_gradient: Float[Tensor, " n"],
    gap: Float[Tensor, " n"],
    *,
    regularization: float,
    beta: float | None,
    workspace: Float[Tensor, "4 n"] | None = None,
) -> Float[Tensor, " n"]:
    """d/dV of loss(low + h(V) * gap) + regularization * rounding_penalty(h(V), beta), in closed form.

    The chain from V to the weight and to the penalty is elementwise, so nothing of it needs an autograd graph.

    Args:
      variable: V.
      weight_gradient: d loss / d weight.
      gap: of `RoundingGrid`.
      regularization: weight of the penalty.
      beta: exponent of the penalty; None where there is none yet.
      workspace: memory that is used again from step to step; its first row is what is returned.
    """
    space = torch.stack([variable] * 4) if workspace is None else workspace
    gradient, sigmoid, centred, magnitude = space.unbind()
    torch.sigmoid(variable, out=sigmoid)
    # 2 h - 1 before clamping; h is clamped, and has no gradient, where this leaves [-1, 1].
    torch.mul(sigmoid, 2.0 * (ZETA - GAMMA), out=centred).add_(2.0 * GAMMA - 1.0)
    torch.mul(weight_gradient, gap, out=gradient)
    if beta is not None:  # |2 h - 1|^(beta - 1) by its logarithm, which takes two thirds of the time of pow
        torch.abs(centred, out=magnitude).log_().mul_(beta - 1.0).exp_()
        gradient.sub_(magnitude.copysign_(centred), alpha=2.0 * beta * regularization)
    torch.ops.aten.sigmoid_backward.grad_input(gradient, sigmoid, grad_input=gradient)
    torch.ops.aten.hardtanh_backward.grad_input(gradient, centred, -1.0, 1.0, grad_input=gradient)
    return gradient.mul_(ZETA - GAMMA)


def annealed_beta(progress: float, *, warmup: float, start: float, end: float) -> float | None:
    """The exponent at `progress` in [0, 1] of the iterations; None during warm-up, when there is no penalty.

    Linear from `start` at the end of the warm-up to `end`, as in the published code.
    """
    if progress < warmup:
        return None
    return start + (end - start) * (progress - warmup) / (1.0 - warmup)


def reconstruction_loss(
    output: Float[Tensor, "batch channels *rest"], target: Float[Tensor, "batch channels *rest"], exponent: float
) -> Float[Tensor, ""]:
    """|output - target|^exponent, summed over axis 1 and averaged over all others, as in BRECQ and Q-Diffusion."""
    error = output - target
    powered = error.square() if exponent == 2.0 else error.abs().pow(exponent)
    return powered.sum() / (output.numel() / output.shape[1])
