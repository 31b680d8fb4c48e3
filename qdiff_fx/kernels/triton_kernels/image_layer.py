"""The layers of `layer` with stride 1 on GPUs that copy tiles by themselves (sm_90 and newer).

A tile of the output is a rectangle of pixels. The copy engine fetches the rectangle that a tap sees, at the tap's
offset, and writes zeros for what lies outside the image: no thread computes an address or a mask. A linear is an image
of one row.

Weights are the left operand, packed ones from registers. The right one is then the activation, which the tensor cores
read where the copy put it. So accumulators are [N, M] until the epilogue.

Layers with few output tiles leave most of the GPU idle; there SPLIT programs share a tile's sum. Each adds its part to
a buffer, and the last to arrive finishes the tile. Integer sums do not depend on the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qdiff_fx.kernels.triton_kernels.epilogue import finish_tile
from qdiff_fx.kernels.triton_kernels.operands import border_correction, unpack


@triton.jit
def image_gemm(
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
    partial,
    arrived,
    images,
    out_height,
    out_width,
    requantize_zero_point,
    requantize_qmin,
    requantize_qmax,
    DEPTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    EMBEDDING_STRIDE: tl.constexpr,
    SILU: tl.constexpr,
    NATIVE: tl.constexpr,
    IMAGES: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of the output: IMAGES x TILE_H x TILE_W pixels, BLOCK_N channels.

    Args:
      x: descriptor of [images, height, width, DEPTH] int8 in blocks [IMAGES, TILE_H, TILE_W, BLOCK_K].
      weight: descriptor of [OUTPUTS, taps * DEPTH] int8, or packed [OUTPUTS, taps * DEPTH / 2], in blocks
        [BLOCK_N, BLOCK_K].
      partial: [images * out_height * out_width, OUTPUTS] int32 of zeros, arrived: [tiles] int32 of zeros; None unless
        SPLIT > 1. The rest as in `implicit_gemm`.
    """
    PACKED: tl.constexpr = weight_zero_point is not None
    LENGTH: tl.constexpr = DEPTH // 2 if PACKED else DEPTH
    TAP_STEPS: tl.constexpr = (LENGTH + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = KERNEL_H * KERNEL_W * TAP_STEPS
    BLOCK_M: tl.constexpr = IMAGES * TILE_H * TILE_W
    BLOCKS_N: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N

    tiles_x, tiles_y = tl.cdiv(out_width, TILE_W), tl.cdiv(out_height, TILE_H)
    blocks_m = tiles_x * tiles_y * tl.cdiv(images, IMAGES)
    program = tl.program_id(0)
    span = GROUP_M * BLOCKS_N
    first_m = program // span * GROUP_M
    group_m = tl.minimum(blocks_m - first_m, GROUP_M)
    block_m = first_m + program % span % group_m
    first_column = program % span // group_m * BLOCK_N
    first_image = block_m // (tiles_x * tiles_y) * IMAGES
    first_y = block_m // tiles_x % tiles_y * TILE_H
    first_x = block_m % tiles_x * TILE_W

    if PACKED:
        row = tl.minimum(first_column + tl.arange(0, BLOCK_N), OUTPUTS - 1)
        zero_point = tl.load(weight_zero_point + row)
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    part: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    first_step = tl.program_id(1) * part
    for step in range(first_step, tl.minimum(first_step + part, STEPS)):
        tap = step // TAP_STEPS
        channel = step % TAP_STEPS * BLOCK_K
        y = first_y - PADDING_H + tap // KERNEL_W * DILATION_H
        x_ = first_x - PADDING_W + tap % KERNEL_W * DILATION_W
        values = weight.load([first_column, tap * LENGTH + channel])
        if PACKED:
            x_low = x.load([first_image, y, x_, channel]).reshape(BLOCK_M, BLOCK_K)
            x_high = x.load([first_image, y, x_, LENGTH + channel]).reshape(BLOCK_M, BLOCK_K)
            if channel_shift is not None:
                shifts = channel_shift + channel + tl.arange(0, BLOCK_K)
                low, high = unpack(values, zero_point, tl.load(shifts), tl.load(shifts + LENGTH), True, NATIVE)
            else:
                low, high = unpack(values, zero_point, None, None, False, NATIVE)
            accumulator = tl.dot(low, x_low.T, accumulator, out_dtype=tl.int32)
            accumulator = tl.dot(high, x_high.T, accumulator, out_dtype=tl.int32)
        else:
            operand = x.load([first_image, y, x_, channel]).reshape(BLOCK_M, BLOCK_K)
            accumulator = tl.dot(values, operand.T, accumulator, out_dtype=tl.int32)

    accumulator = accumulator.T
    pixel = tl.arange(0, BLOCK_M)
    image, tile_y, tile_x = pixel // (TILE_H * TILE_W), pixel // TILE_W % TILE_H, pixel % TILE_W
    out_y, out_x = first_y + tile_y, first_x + tile_x
    here = (first_image + image < images) & (out_y < out_height) & (out_x < out_width)
    first_row = (first_image * out_height + first_y) * out_width + first_x
    local_row = (image * out_height + tile_y) * out_width + tile_x
    column = first_column + tl.arange(0, BLOCK_N)
    inside = column < OUTPUTS
    last = True
    if SPLIT > 1:
        sums = partial + first_row.to(tl.int64) * OUTPUTS + local_row[:, None] * OUTPUTS + column[None, :]
        valid = here[:, None] & inside[None, :]
        tl.atomic_add(sums, accumulator, mask=valid, sem="relaxed")
        tl.debug_barrier()  # every thread has added before one of them counts the program
        last = tl.atomic_add(arrived + program, 1, sem="acq_rel") == SPLIT - 1
    if last:
        if SPLIT > 1:
            accumulator = tl.load(sums, mask=valid, other=0, cache_modifier=".cg")
        height = out_height - 2 * PADDING_H + DILATION_H * (KERNEL_H - 1)
        width = out_width - 2 * PADDING_W + DILATION_W * (KERNEL_W - 1)
        accumulator -= border_correction(
            correction, out_y, out_x, height, width, column, inside,
            OUTPUTS, KERNEL_H, KERNEL_W, 1, 1, PADDING_H, PADDING_W, DILATION_H, DILATION_W,
        )  # fmt: skip
        finish_tile(
            accumulator,
            first_row,
            local_row,
            here,
            column,
            inside,
            tl.minimum(first_image + image, images - 1),
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
