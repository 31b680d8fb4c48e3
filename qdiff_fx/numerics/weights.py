"""Integer weights: per-output-channel codes, per-input-channel factors and shifts, folding into int8.

For output channel o and input channel c, with factor m_c > 0 and shift k_c in 0..3 (DESIGN: integer semantics):

    grid weight   g[o, c]  = fp32(W[o, c] * fp32(m_c * 2^-k_c))                      what the weight grid sees
    code          q[o, c]  = clamp(round_half_even(g[o, c] * fp32(1 / s_w[o])) + z_w[o], qmin, qmax)
    kernel's int8          = (q[o, c] - z_w[o]) * 2^k_c
    real weight            = (q[o, c] - z_w[o]) * s_w[o] * fp32(1 / fp32(m_c * 2^-k_c))

so that sum_c (q_x - z_x) * int8 * s_x * s_w[o] is the layer's output when the activation of channel c has step
s_x * m_c. In a grouped convolution c runs over all C_in = groups * I channels, and the rows of group g see the channels
of group g.
"""

import torch
from jaxtyping import Bool, Float, Int8, Integer, Num
from torch import Tensor

from qdiff_fx.errors import QuantSpecError
from qdiff_fx.numerics.affine import along_axis, dequantize, fake_quantize, quantize, reciprocal
from qdiff_fx.numerics.spec import QuantSpec

MAXIMUM_SHIFT = 3
"""Largest left shift of a folded code: two bits a channel are stored."""

_LARGEST_FOLDED = 127


def expand_input_channels(
    values: Num[Tensor, " C_in"], weight_shape: torch.Size | tuple[int, ...], groups: int = 1
) -> Num[Tensor, "..."]:
    """`values` of all input channels, viewed so that they broadcast over a weight [O, C_in / groups, ...].

    Returns: [1, C_in, 1, ...], or [O, C_in / groups, 1, ...] for a grouped weight.
    Raises: QuantSpecError if the number of channels does not fit the weight.
    """
    rows, columns, *kernel = weight_shape
    if values.ndim != 1 or values.shape[0] != columns * groups or rows % groups:
        raise QuantSpecError(
            f"channel vector {tuple(values.shape)} for a weight {tuple(weight_shape)} with groups={groups}: "
            f"want [{columns * groups}], and output channels divisible by groups"
        )
    if groups > 1:
        values = values.view(groups, columns).repeat_interleave(rows // groups, dim=0)
    return values.reshape(-1, columns, *[1] * len(kernel))


def input_channel_multiplier(
    weight_shape: torch.Size | tuple[int, ...],
    *,
    channel_factor: Float[Tensor, " C_in"] | None = None,
    channel_shift: Integer[Tensor, " C_in"] | None = None,
    groups: int = 1,
) -> Float[Tensor, "..."] | None:
    """fp32(m_c * 2^-k_c), broadcastable over the weight; None where there is neither factor nor shift."""
    multiplier = None if channel_factor is None else channel_factor.to(torch.float32)
    if channel_shift is not None:
        power = torch.exp2(-channel_shift.to(torch.float32))
        multiplier = power if multiplier is None else multiplier * power
    return None if multiplier is None else expand_input_channels(multiplier, weight_shape, groups)


def grid_weight(
    weight: Float[Tensor, "O I *k"],
    *,
    channel_factor: Float[Tensor, " C_in"] | None = None,
    channel_shift: Integer[Tensor, " C_in"] | None = None,
    groups: int = 1,
) -> Float[Tensor, "O I *k"]:
    """The weight as its grid sees it, in float32: W * m_c * 2^-k_c. Weight observers and searches look at this."""
    multiplier = input_channel_multiplier(
        weight.shape, channel_factor=channel_factor, channel_shift=channel_shift, groups=groups
    )
    return weight.to(torch.float32) if multiplier is None else weight.to(torch.float32) * multiplier


def weight_codes(
    weight: Float[Tensor, "O I *k"],
    scale: Float[Tensor, "..."],
    zero_point: Integer[Tensor, "..."],
    spec: QuantSpec,
    *,
    channel_factor: Float[Tensor, " C_in"] | None = None,
    channel_shift: Integer[Tensor, " C_in"] | None = None,
    groups: int = 1,
    round_up: Bool[Tensor, "O I *k"] | None = None,
) -> Integer[Tensor, "O I *k"]:
    """Codes of a weight, rounded to nearest or as `round_up` says: uint8, or int8 for a signed spec.

    Args:
      weight: [O, C_in / groups, ...], real units.
      scale, zero_point: [O] or [], of the grid weight.
      spec: the weight's grid.
      channel_factor: [C_in], > 0.
      channel_shift: [C_in], integers in 0..3.
      groups: of the convolution.
      round_up: learned rounding: the code is floor, or floor + 1 where True, clamped to the grid.
    """
    seen = grid_weight(weight, channel_factor=channel_factor, channel_shift=channel_shift, groups=groups)
    inv_scale, offset = along_axis(reciprocal(scale), weight.ndim), along_axis(zero_point, weight.ndim)
    if round_up is None:
        codes = quantize(seen, inv_scale, offset, spec.qmin, spec.qmax)
    else:
        codes = torch.clamp(torch.floor(seen * inv_scale) + round_up + offset, spec.qmin, spec.qmax)
    return codes.to(torch.int8 if spec.signed else torch.uint8)


def fold_codes(
    codes: Integer[Tensor, "O I *k"],
    zero_point: int | Integer[Tensor, "..."],
    channel_shift: Integer[Tensor, " C_in"] | None = None,
    *,
    groups: int = 1,
    validate: bool = True,
) -> Int8[Tensor, "O I *k"]:
    """The int8 weight that kernels read: (code - zero_point) * 2^shift.

    Args:
      codes: [O, C_in / groups, ...].
      zero_point: integer, [] or [O].
      channel_shift: [C_in], integers in 0..3; None is no shift.
      groups: of the convolution.
      validate: check the values; switch it off in code that is traced, where values aren't known.

    Raises:
      QuantSpecError: if a shift is outside 0..3 or a folded value outside [-127, 127].
    """
    if isinstance(zero_point, Tensor):
        zero_point = along_axis(zero_point.to(torch.int32), codes.ndim)
    folded = codes.to(torch.int32) - zero_point
    if channel_shift is not None:
        if validate and not bool(((channel_shift >= 0) & (channel_shift <= MAXIMUM_SHIFT)).all()):
            raise QuantSpecError(
                f"channel shifts in [{int(channel_shift.min())}, {int(channel_shift.max())}]: "
                f"want 0..{MAXIMUM_SHIFT}; clamp them where they are chosen"
            )
        # Multiplied, not shifted: a left shift of a negative integer is undefined in C++.
        powers = torch.exp2(channel_shift.to(torch.float32)).to(torch.int32)
        folded = folded * expand_input_channels(powers, codes.shape, groups)
    if validate and folded.numel() and int(folded.abs().max()) > _LARGEST_FOLDED:
        raise QuantSpecError(
            f"folded weight codes in [{int(folded.min())}, {int(folded.max())}]: want [-127, 127]; "
            "use a symmetric narrow 8-bit grid, or smaller channel shifts"
        )
    return folded.to(torch.int8)


def fake_quantize_weight(
    weight: Float[Tensor, "O I *k"],
    scale: Float[Tensor, "..."],
    zero_point: int | Integer[Tensor, "..."],
    spec: QuantSpec,
    *,
    channel_factor: Float[Tensor, " C_in"] | None = None,
    channel_shift: Integer[Tensor, " C_in"] | None = None,
    groups: int = 1,
    round_up: Bool[Tensor, "O I *k"] | None = None,
) -> Float[Tensor, "O I *k"]:
    """The weight that its codes stand for, in real units and the dtype of `weight`.

    Differentiable as `fake_quantize`, but for learned rounding. Arguments as in `weight_codes`.
    """
    multiplier = input_channel_multiplier(
        weight.shape, channel_factor=channel_factor, channel_shift=channel_shift, groups=groups
    )
    if round_up is not None:
        codes = weight_codes(
            weight.detach(),
            scale,
            zero_point if isinstance(zero_point, Tensor) else torch.tensor(zero_point, device=weight.device),
            spec,
            channel_factor=channel_factor,
            channel_shift=channel_shift,
            groups=groups,
            round_up=round_up,
        )
        offset = along_axis(zero_point, weight.ndim) if isinstance(zero_point, Tensor) else zero_point
        chosen = dequantize(codes, along_axis(scale.to(torch.float32), weight.ndim), offset)
        return (chosen if multiplier is None else chosen * reciprocal(multiplier)).to(weight.dtype)
    if multiplier is None:
        return fake_quantize(weight, scale, zero_point, spec)
    rounded = fake_quantize(weight.to(torch.float32) * multiplier, scale, zero_point, spec)
    return (rounded * reciprocal(multiplier)).to(weight.dtype)
