"""What the layer kernels do to their operands: unpack 4-bit weights, correct the zero points of activations."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack(packed, zero_point, shift_low, shift_high, SHIFTED: tl.constexpr, NATIVE: tl.constexpr):
    """Both int8 operands of a byte tile [N, K]: (code - zero point) << shift, exact in 8 bits.

    Args:
      zero_point: [N] int8.
      shift_low, shift_high: [K] int8, of either half of the channels; None unless SHIFTED.
      NATIVE: four bytes at a time in one register, in instructions that Triton's interpreter does not know. Triton
        itself takes bytes one by one, which costs more than the matrix product.
    """
    if NATIVE:
        zero_point = tl.broadcast_to(zero_point[:, None], packed.shape)
        # A byte of 128 + code lends nothing to its neighbour when a zero point is subtracted; toggling bit 7 takes the
        # 128 away again. 0xEA is (a & b) | c.
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 codes;
            lop3.b32 codes, $2, 0x0F0F0F0F, 0x80808080, 0xEA;
            sub.s32 codes, codes, $3;
            xor.b32 $0, codes, 0x80808080;
            shr.u32 codes, $2, 4;
            lop3.b32 codes, codes, 0x0F0F0F0F, 0x80808080, 0xEA;
            sub.s32 codes, codes, $3;
            xor.b32 $1, codes, 0x80808080;
            }
            """,
            "=&r,=&r,r,r",
            [packed, zero_point],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
        if SHIFTED:
            low = _shift_bytes(low, tl.broadcast_to(shift_low[None, :], low.shape))
            high = _shift_bytes(high, tl.broadcast_to(shift_high[None, :], high.shape))
    else:
        low = (packed & 15) - zero_point[:, None]
        high = ((packed >> 4) & 15) - zero_point[:, None]
        if SHIFTED:
            low = low << shift_low[None, :]
            high = high << shift_high[None, :]
    return low, high


@triton.jit
def _shift_bytes(value, shift):
    """value << shift of signed bytes, shift from 0 to 3, where nothing overflows: by 1 and by 2, each where asked."""
    # A bit of the shift times 255 is a mask of its byte. 0xCA is (a & b) | (~a & c).
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 mask, moved;
        and.b32 mask, $2, 0x01010101;
        mul.lo.u32 mask, mask, 255;
        shl.b32 moved, $1, 1;
        and.b32 moved, moved, 0xFEFEFEFE;
        lop3.b32 $0, mask, moved, $1, 0xCA;
        shr.u32 mask, $2, 1;
        and.b32 mask, mask, 0x01010101;
        mul.lo.u32 mask, mask, 255;
        shl.b32 moved, $0, 2;
        and.b32 moved, moved, 0xFCFCFCFC;
        lop3.b32 $0, mask, moved, $0, 0xCA;
        }
        """,
        "=&r,r,r",
        [value, shift],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def border_correction(
    correction,
    out_y,
    out_x,
    height,
    width,
    column,
    inside,
    OUTPUTS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
):
    """What the zero point adds to the accumulators of output pixels [M] in columns [N]: [M, N] or [1, N] int32.

    Args:
      correction: [patterns, OUTPUTS] int32, as `cuda_weights.correction_table` orders it.
    """
    if PADDING_H + PADDING_W > 0:
        LIMIT: tl.constexpr = (PADDING_W + DILATION_W - 1) // DILATION_W + 1
        pattern = _cut_taps(out_y, height, KERNEL_H, STRIDE_H, PADDING_H, DILATION_H) * (LIMIT * LIMIT) + _cut_taps(
            out_x, width, KERNEL_W, STRIDE_W, PADDING_W, DILATION_W
        )
        found = tl.load(correction + pattern[:, None] * OUTPUTS + column[None, :], mask=inside[None, :], other=0)
    else:
        found = tl.load(correction + column, mask=inside, other=0)[None, :]
    return found


@triton.jit
def _cut_taps(
    position, size, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr
):
    """How many taps of an output position fall before the image, and how many behind it, as before * limit + behind."""
    LIMIT: tl.constexpr = (PADDING + DILATION - 1) // DILATION + 1
    first = PADDING - position * STRIDE
    before = tl.minimum(tl.maximum(first + DILATION - 1, 0) // DILATION, LIMIT - 1)
    reached = tl.maximum(size - 1 + first + DILATION, 0) // DILATION  # taps that start before the image's end
    behind = tl.minimum(tl.maximum(KERNEL - reached, 0), LIMIT - 1)
    return before * LIMIT + behind
