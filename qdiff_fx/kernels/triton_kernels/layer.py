"""Convolution and linear as one implicit GEMM over channels-last int8 activations.

rows m = (batch, output row, output column), columns n = output channels, depth = (tap, input channel). Taps outside
the image are masked to 0, which costs nothing; what the zero point would have added there is in the correction
table, [patterns, outputs] int32: z * sum of the weights that a pixel sees, by how many taps the border cuts off it
(docs/decisions/030-cuda-kernels.md).

Packed weights hold channel j of a tap in the low nibble and channel j + half in the high one, so that a byte tile
gives two operand tiles and no register is interleaved. They are the left operand: Hopper's tensor cores read that one
from registers, where it is unpacked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qdiff_fx.kernels.triton_kernels.epilogue import finish_tile
from qdiff_fx.kernels.triton_kernels.operands import border_correction, unpack


@triton.jit
def implicit_gemm(
    x,
    weight,
    scale,
    correction,
    weight_zero_point,
    channel_shift,
    bias,
    embedding,
    residual,
    inv_scale,
    output,
    rows,
    height,
    width,
    out_height,
    out_width,
    requantize_zero_point,
    requantize_qmin,
    requantize_qmax,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    EMBEDDING_STRIDE: tl.constexpr,
    SILU: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One BLOCK_M x BLOCK_N tile of the output.

    Args:
      x: [batch, height, width, CHANNELS] int8.
      weight: [OUTPUTS, taps, CHANNELS / GROUPS] int8; packed, [OUTPUTS, taps, half] uint8 seen as int8.
      correction: [patterns, OUTPUTS] int32.
      weight_zero_point: [OUTPUTS] int8 of packed weights, None for int8 ones.
      channel_shift: [GROUPS * 2 * half] int8, None without shifts.
      output: [rows, OUTPUTS] in its own dtype; int8 where inv_scale is given. The rest as in `finish_tile`.
    """
    DEPTH: tl.constexpr = CHANNELS // GROUPS
    WIDTH: tl.constexpr = OUTPUTS // GROUPS
    PACKED: tl.constexpr = weight_zero_point is not None
    HALF: tl.constexpr = (DEPTH + 1) // 2
    LENGTH: tl.constexpr = HALF if PACKED else DEPTH  # of a tap in a weight's row
    STEPS: tl.constexpr = (LENGTH + BLOCK_K - 1) // BLOCK_K
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    PADDED: tl.constexpr = PADDING_H + PADDING_W > 0
    POINTWISE: tl.constexpr = TAPS == 1 and STRIDE_H == 1 and STRIDE_W == 1 and not PADDED
    WHOLE: tl.constexpr = LENGTH % BLOCK_K == 0 and (DEPTH % 2 == 0 or not PACKED)
    BLOCKS_N: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N

    # Tiles that share rows of x run close together, so that L2 serves them.
    program = tl.program_id(0)
    blocks_m = tl.cdiv(rows, BLOCK_M)
    span = GROUP_M * BLOCKS_N * GROUPS
    first_m = program // span * GROUP_M
    group_m = tl.minimum(blocks_m - first_m, GROUP_M)
    block_m = first_m + program % span % group_m
    block_n = program % span // group_m
    group = block_n // BLOCKS_N

    local = block_n % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    # Clamped indices read what is thrown away; where columns are contiguous in memory a mask keeps loads wide.
    first_row = block_m * BLOCK_M
    local_row = tl.minimum(tl.arange(0, BLOCK_M), rows - 1 - first_row)
    row = first_row + local_row
    column = group * WIDTH + local
    output_channel = group * WIDTH + tl.minimum(local, WIDTH - 1)
    depth = tl.arange(0, BLOCK_K)

    image = row // (out_height * out_width)
    out_y = row // out_width % out_height
    out_x = row % out_width
    weight_row = weight + output_channel.to(tl.int64)[:, None] * (TAPS * LENGTH)
    if PACKED:
        zero_point = tl.load(weight_zero_point + output_channel)
        accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    else:
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)

    for step in range(TAPS * STEPS):
        tap = step // STEPS
        channel = step % STEPS * BLOCK_K + depth
        if POINTWISE:
            pixel = row
            seen = row >= 0
        else:
            y = out_y * STRIDE_H - PADDING_H + tap // KERNEL_W * DILATION_H
            x_ = out_x * STRIDE_W - PADDING_W + tap % KERNEL_W * DILATION_W
            seen = (y >= 0) & (y < height) & (x_ >= 0) & (x_ < width)
            pixel = (image * height + y) * width + x_
        x_tile = x + pixel.to(tl.int64)[:, None] * CHANNELS + (group * DEPTH + channel)[None, :]
        weight_tile = weight_row + tap * LENGTH + channel[None, :]
        values = tl.load(weight_tile) if WHOLE else tl.load(weight_tile, mask=(channel < LENGTH)[None, :], other=0)
        if PACKED:
            if WHOLE and not PADDED:
                x_low = tl.load(x_tile)
                x_high = tl.load(x_tile + HALF)
            elif WHOLE:
                x_low = tl.load(x_tile, mask=seen[:, None], other=0)
                x_high = tl.load(x_tile + HALF, mask=seen[:, None], other=0)
            else:
                x_low = tl.load(x_tile, mask=seen[:, None] & (channel < HALF)[None, :], other=0)
                x_high = tl.load(x_tile + HALF, mask=seen[:, None] & (channel < DEPTH - HALF)[None, :], other=0)
            if channel_shift is not None:
                shifts = channel_shift + group * (2 * HALF) + tl.minimum(channel, HALF - 1)
                low, high = unpack(values, zero_point, tl.load(shifts), tl.load(shifts + HALF), True, NATIVE)
            else:
                low, high = unpack(values, zero_point, None, None, False, NATIVE)
            accumulator = tl.dot(low, x_low.T, accumulator, out_dtype=tl.int32)
            accumulator = tl.dot(high, x_high.T, accumulator, out_dtype=tl.int32)
        else:
            if WHOLE and not PADDED:
                operand = tl.load(x_tile)
            elif WHOLE:
                operand = tl.load(x_tile, mask=seen[:, None], other=0)
            else:
                operand = tl.load(x_tile, mask=seen[:, None] & (channel < LENGTH)[None, :], other=0)
            accumulator = tl.dot(operand, values.T, accumulator, out_dtype=tl.int32)

    if PACKED:
        accumulator = accumulator.T
    accumulator -= border_correction(
        correction, out_y, out_x, height, width, column, local < WIDTH,
        OUTPUTS, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, DILATION_H, DILATION_W,
    )  # fmt: skip
    finish_tile(
        accumulator,
        first_row,
        tl.arange(0, BLOCK_M),
        tl.arange(0, BLOCK_M) < rows - first_row,
        column,
        local < WIDTH,
        image,
        scale,
        bias,
        embedding,
        EMBEDDING_STRIDE,
        residual,
        inv_scale,
        output,
        requantize_zero_point,
        requantize_qmin,
        requantize_qmax,
        OUTPUTS,
        SILU,
    )
