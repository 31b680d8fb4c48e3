"""From int32 accumulators to a layer's output: one definition for every kernel that ends a layer.

The order of the float32 operations is that of `reference.finish`, and kernels are compiled without contraction into
fused multiply-adds, so that both give the same bits wherever no exponential is involved.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_half_even(value, bound: tl.constexpr):
    """`value` rounded to the nearest integer, ties to even, after clamping to [-bound, bound]; bound <= 2^21.

    1.5 * 2^23 has steps of one, and the addition rounds half to even.
    """
    clamped = tl.minimum(tl.maximum(value, -bound), bound)
    return (clamped + 12582912.0) - 12582912.0


@triton.jit
def silu(value):
    """x / (1 + exp(-x)) in float32."""
    return value / (1.0 + tl.exp(-value))


@triton.jit
def finish_tile(
    accumulator,
    first_row,
    local_row,
    here,
    column,
    inside,
    embedding_row,
    scale,
    bias,
    embedding,
    EMBEDDING_STRIDE: tl.constexpr,
    residual,
    inv_scale,
    output,
    requantize_zero_point,
    requantize_qmin,
    requantize_qmax,
    OUTPUTS: tl.constexpr,
    SILU: tl.constexpr,
):
    """Dequantize, add, activate, perhaps requantize, and store one tile.

    Args:
      accumulator: [M, N] int32, zero points corrected.
      first_row: of the tile in the output as [rows, OUTPUTS].
      local_row: [M], its rows in the output, counted from that one.
      here: [M], which of its rows exist.
      column, inside: [N] output channels, and which of them exist.
      embedding_row: [M], the batch entry of a row.
      scale, bias, inv_scale: float32 [OUTPUTS]; embedding: [B, OUTPUTS], its rows
        EMBEDDING_STRIDE apart; residual: [rows, OUTPUTS]; None to leave out.
    """
    start = first_row.to(tl.int64) * OUTPUTS
    offset = local_row[:, None] * OUTPUTS + column[None, :]
    valid = here[:, None] & inside[None, :]
    value = accumulator.to(tl.float32) * tl.load(scale + column, mask=inside, other=0.0)[None, :]
    if bias is not None:
        value = value + tl.load(bias + column, mask=inside, other=0.0)[None, :]
    if embedding is not None:
        entry = embedding + embedding_row[:, None] * EMBEDDING_STRIDE + column[None, :]
        value = value + tl.load(entry, mask=inside[None, :], other=0.0).to(tl.float32)
    if residual is not None:
        value = value + tl.load(residual + start + offset, mask=valid, other=0.0).to(tl.float32)
    if SILU:
        value = silu(value)
    if inv_scale is not None:
        code = (
            round_half_even(value * tl.load(inv_scale + column, mask=inside, other=0.0)[None, :], 65536.0)
            + requantize_zero_point
        )
        value = tl.minimum(tl.maximum(code, requantize_qmin), requantize_qmax)
    tl.store(output + start + offset, value.to(output.dtype.element_ty), mask=valid)
