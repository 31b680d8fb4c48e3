"""The end of a layer whose int32 product comes from the vendor's matmul."""

from __future__ import annotations

import triton
import triton.language as tl

from qdiff_fx.kernels.triton_kernels.epilogue import finish_tile


@triton.jit
def rescale(
    product,
    scale,
    correction,
    bias,
    residual,
    inv_scale,
    output,
    rows,
    requantize_zero_point,
    requantize_qmin,
    requantize_qmax,
    OUTPUTS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Correct the zero point of product [rows, OUTPUTS] int32 and finish it; the rest as in `finish_tile`."""
    BLOCKS_N: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    first_row = tl.program_id(0) // BLOCKS_N * BLOCK_M
    local_row = tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    here, inside = local_row < rows - first_row, column < OUTPUTS
    product += first_row.to(tl.int64) * OUTPUTS
    accumulator = tl.load(product + local_row[:, None] * OUTPUTS + column[None, :], here[:, None] & inside[None, :], 0)
    accumulator -= tl.load(correction + column, mask=inside, other=0)[None, :]
    finish_tile(
        accumulator,
        first_row,
        local_row,
        here,
        column,
        inside,
        first_row,
        scale,
        bias,
        None,
        0,
        residual,
        inv_scale,
        output,
        requantize_zero_point,
        requantize_qmin,
        requantize_qmax,
        OUTPUTS,
        SILU,
    )
