"""Grids and arguments of the kernels: plain functions of tensors, without synchronisation or data-dependent shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional
from triton.runtime.errors import OutOfResources as OutOfResources
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from qdiff_fx.kernels.cuda_tiles import pixel_block
from qdiff_fx.kernels.triton_kernels.attention import attention, score_accumulators
from qdiff_fx.kernels.triton_kernels.image_layer import image_gemm
from qdiff_fx.kernels.triton_kernels.layer import implicit_gemm
from qdiff_fx.kernels.triton_kernels.rescale import rescale

GROUP_M = 8
"""Rows of tiles that run together, so that L2 holds the weights they share."""

SMALLEST_INT_MM = 17
"""torch._int_mm takes more than 16 rows."""

EXACT = {"enable_fp_fusion": False}
"""No fused multiply-adds in epilogues: the same bits as the reference."""


RESCALE_TILE = (32, 128, 4)
"""Rows, outputs and warps of `rescale`."""

SCORE_TILE = (64, 64, 4)
"""Queries, keys and warps of `score_accumulators`."""


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1), hence on the CPU."""
    return not isinstance(implicit_gemm, JITFunction)


def conv2d(
    x: Tensor,
    weight: Tensor,
    constants: Sequence[Tensor | None],
    residual: Tensor | None,
    output: Tensor,
    requantize: Sequence[int],
    silu: bool,
    weight_shape: Sequence[int],
    geometry: Sequence[Sequence[int]],
    groups: int,
    tile: Sequence[int],
) -> None:
    """Fill `output` [B, O, H', W'] channels_last from x [B, C, H, W] int8.

    Args:
      constants: scale, correction, weight_zero_point, channel_shift, bias, embedding, inv_scale.
      geometry: stride, padding, dilation.
      tile: rows, outputs, depth, warps, stages, whether by descriptors, split.
    """
    batch, channels, height, width = x.shape
    if residual is not None:
        residual = _rows_of_image(residual)
    if tile[5]:
        sizes = (batch, output.shape[2], output.shape[3])
        kernel = (*weight_shape[2:], *geometry[1], *geometry[2])
        _image_gemm(_rows_of_image(x), weight, constants, residual, output, sizes, requantize, kernel, silu, tile)
        return
    _gemm(
        _rows_of_image(x),
        weight,
        constants,
        residual,
        output,
        (batch * output.shape[2] * output.shape[3], height, width, output.shape[2], output.shape[3]),
        requantize,
        (channels, weight_shape[0], groups, *weight_shape[2:], *(item for pair in geometry for item in pair)),
        silu,
        tile,
    )


def linear(
    x: Tensor,
    weight: Tensor,
    constants: Sequence[Tensor | None],
    residual: Tensor | None,
    output: Tensor,
    requantize: Sequence[int],
    silu: bool,
    tile: Sequence[int],
) -> None:
    """Fill `output` [..., O] from x [..., C] int8, by the kernel that convolutions use; arguments as in `conv2d`."""
    rows = prod(x.shape[:-1])
    if residual is not None:
        residual = residual.contiguous()
    if tile[5]:
        image = x.reshape(1, 1, rows, x.shape[-1]).contiguous()
        kernel = (1, 1, 0, 0, 1, 1)
        _image_gemm(image, weight, constants, residual, output, (1, 1, rows), requantize, kernel, silu, tile)
        return
    _gemm(
        x.contiguous(),
        weight,
        constants,
        residual,
        output,
        (rows, 1, 1, 1, 1),
        requantize,
        (x.shape[-1], output.shape[-1], 1, 1, 1, 1, 1, 0, 0, 1, 1),
        silu,
        tile,
    )


def _gemm(
    x: Tensor,
    weight: Tensor,
    constants: Sequence[Tensor | None],
    residual: Tensor | None,
    output: Tensor,
    sizes: tuple[int, ...],
    requantize: Sequence[int],
    geometry: tuple[int, ...],
    silu: bool,
    tile: Sequence[int],
) -> None:
    scale, correction, zero_point, shift, bias, embedding, inv_scale = constants
    block_m, block_n, block_k, warps, stages = tile[:5]
    outputs, groups = geometry[1:3]
    grid = (triton.cdiv(sizes[0], block_m) * triton.cdiv(outputs // groups, block_n) * groups,)
    operands = (x, weight, scale, correction, zero_point, shift, bias, embedding, residual, inv_scale)
    numbers: Any = (*sizes, *requantize, *geometry, _row_stride(embedding), silu)
    if not grid[0]:
        return
    with _stored(output) as buffer:
        implicit_gemm[grid](
            *operands,
            buffer,
            *numbers,
            NATIVE=not interpreted(),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP_M=GROUP_M,
            num_warps=warps,
            num_stages=stages,
            **EXACT,
        )


def _image_gemm(
    x: Tensor,
    weight: Tensor,
    constants: Sequence[Tensor | None],
    residual: Tensor | None,
    output: Tensor,
    sizes: tuple[int, int, int],
    requantize: Sequence[int],
    kernel: tuple[int, ...],
    silu: bool,
    tile: Sequence[int],
) -> None:
    """Fill `output` from x [images, height, width, C] by the kernel whose tiles the copy engine fetches.

    Args:
      sizes: images, height and width of the output.
      kernel: its size, padding and dilation.
    """
    scale, correction, zero_point, shift, bias, embedding, inv_scale = constants
    block_m, block_n, block_k, warps, stages, _, split = tile
    depth, outputs = x.shape[-1], weight.shape[0]
    pixels = pixel_block(block_m, *sizes)
    blocks = prod(triton.cdiv(size, block) for size, block in zip(sizes, pixels, strict=True))
    grid = (blocks * triton.cdiv(outputs, block_n), split)
    if not grid[0]:
        return
    partial, arrived = None, None
    if split > 1:
        length = prod(sizes) * outputs
        zeros = x.new_zeros(length + grid[0], dtype=torch.int32)
        partial, arrived = zeros, zeros.narrow(0, length, grid[0])
    numbers: Any = (*sizes, *requantize, depth, outputs, *kernel, _row_stride(embedding), silu)
    with _stored(output) as buffer:
        image_gemm[grid](
            _described(x, [*pixels, block_k]),
            _described(weight, [block_n, block_k]),
            *(scale, correction, zero_point, shift, bias, embedding, residual, inv_scale),
            buffer,
            *(partial, arrived),
            *numbers,
            NATIVE=not interpreted(),
            IMAGES=pixels[0],
            TILE_H=pixels[1],
            TILE_W=pixels[2],
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            SPLIT=split,
            GROUP_M=GROUP_M,
            num_warps=warps,
            num_stages=stages,
            **EXACT,
        )


def _row_stride(embedding: Tensor | None) -> int:
    return 0 if embedding is None else embedding.stride(0)


def _described(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """What the copy engine is told of a contiguous tensor, or of a copy where its address is no multiple of 16."""
    if tensor.data_ptr() % 16:
        tensor = tensor.clone()
    # A contiguous tensor has any stride where its size is 1; flattened and seen again it has those of its shape.
    return TensorDescriptor.from_tensor(tensor.reshape(-1).view(tensor.shape), block)


def int_mm_linear(
    x: Tensor,
    weight: Tensor,
    constants: Sequence[Tensor | None],
    residual: Tensor | None,
    output: Tensor,
    requantize: Sequence[int],
    silu: bool,
) -> None:
    """Fill `output` [..., O] by torch._int_mm and one kernel more; weight [O, C] int8, C and O multiples of 8.

    Fewer rows than `_int_mm` takes are padded.
    """
    scale, correction, _, _, bias, _, inv_scale = constants
    rows, outputs = prod(x.shape[:-1]), output.shape[-1]
    if not rows:
        return
    matrix = x.reshape(rows, x.shape[-1]).contiguous()
    if rows < SMALLEST_INT_MM:
        matrix = functional.pad(matrix, (0, 0, 0, SMALLEST_INT_MM - rows))
    product = torch._int_mm(matrix, weight.t())
    block_m, block_n, warps = RESCALE_TILE
    with _stored(output) as buffer:
        rescale[(triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n),)](
            product,
            scale,
            correction,
            bias,
            None if residual is None else residual.contiguous(),
            inv_scale,
            buffer,
            rows,
            *requantize,
            outputs,
            silu,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            **EXACT,
        )


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    score_scale: float,
    output_scale: float,
    zero_points: Sequence[int],
    qmax: int,
    output: Tensor,
    tile: Sequence[int],
) -> None:
    """Fill `output` [..., L, D] from signed codes q [..., L, E], k [..., S, E], v [..., S, D]; arguments as in `ops`.

    Args:
      zero_points: of the signed codes of q, k, v.
      tile: queries, keys, warps, stages.
    """
    *leading, queries, head = query.shape
    keys, value_head = value.shape[-2:]
    if not output.numel():
        return
    block_m, block_n, warps, stages = tile
    heads = leading[-1] if len(leading) > 1 else 1
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask = mask.expand(*leading, queries, keys).reshape(-1, heads, queries, keys)
        mask = mask.view(torch.int8) if mask.dtype == torch.bool else mask
        strides = mask.stride()
    with _stored(output) as buffer:
        attention[(triton.cdiv(queries, block_m), prod(leading))](
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            key.sum(-1, dtype=torch.int32),
            value.sum(-2, dtype=torch.int32),
            mask,
            buffer,
            queries,
            keys,
            heads,
            *strides,
            score_scale,
            output_scale,
            *zero_points,
            qmax,
            is_causal,
            HEAD=head,
            VALUE_HEAD=value_head,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_E=head_block(head),
            BLOCK_D=head_block(value_head),
            num_warps=warps,
            num_stages=stages,
            **EXACT,
        )


def attention_scores(query: Tensor, key: Tensor, zero_points: Sequence[int]) -> Tensor:
    """[L, S] int32 score accumulators of one head, as `fused_attention` computes them."""
    (queries, head), keys = query.shape, key.shape[0]
    output = torch.empty(queries, keys, dtype=torch.int32, device=query.device)
    block_m, block_n, warps = SCORE_TILE
    score_accumulators[(triton.cdiv(queries, block_m), triton.cdiv(keys, block_n))](
        query,
        key,
        key.sum(-1, dtype=torch.int32),
        output,
        queries,
        keys,
        *zero_points[:2],
        HEAD=head,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_E=head_block(head),
        num_warps=warps,
        **EXACT,
    )
    return output


@contextmanager
def _stored(output: Tensor) -> Iterator[Tensor]:
    """What a kernel writes for `output`: itself, but a float32 tensor where the interpreter would truncate to bf16."""
    if output.dtype != torch.bfloat16 or not interpreted():
        yield output
        return
    buffer = torch.empty_like(output, dtype=torch.float32)
    yield buffer
    output.copy_(buffer)


def head_block(size: int) -> int:
    """Elements of a head that a tile holds: a power of two, 32 at least (the depth of one int8 product)."""
    return max(32, int(triton.next_power_of_2(size)))


def _rows_of_image(x: Tensor) -> Tensor:
    """[B, H, W, C] contiguous; free for a channels_last image."""
    return x.permute(0, 2, 3, 1).contiguous()
