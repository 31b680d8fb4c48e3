"""Attention with int8 products in two passes: row maximum and sum, then quantized probabilities times v.

Both passes recompute the scores, so that each probability is rounded after its sum is known, as the plan defines it.
Codes are signed: q, k, v as in the plan less 128, probabilities p less 128 (Triton has no mixed-sign product), with
sum p (v - z) = sum (p - 128) v + 128 sum v - z sum p.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qdiff_fx.kernels.triton_kernels.epilogue import round_half_even


@triton.jit
def centred_scores(query, key, query_sum, key_sum, query_zero_point, key_zero_point, HEAD: tl.constexpr):
    """[M, N] int32: sum over the head of (q - z_q)(k - z_k), from tiles [M, E] and [N, E] of signed codes."""
    raw = tl.dot(query, key.T)
    offset = query_sum * key_zero_point - HEAD * query_zero_point * key_zero_point
    return raw - offset[:, None] - (key_sum * query_zero_point)[None, :]


@triton.jit
def _scores(
    query,
    query_sum,
    key,
    key_sums,
    mask,
    row,
    start,
    mask_row,
    mask_stride_key,
    score_scale,
    query_zero_point,
    key_zero_point,
    keys,
    CAUSAL: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Masked, scaled scores [M, N] of the keys from `start` on, in float32; -inf where a key takes no part."""
    column = start + tl.arange(0, BLOCK_N)
    element = tl.arange(0, BLOCK_E)
    present = column < keys
    key_tile = tl.load(
        key + column.to(tl.int64)[:, None] * HEAD + element[None, :],
        mask=present[:, None] & (element < HEAD)[None, :],
        other=0,
    )
    key_sum = tl.load(key_sums + column, mask=present, other=0)
    exact = centred_scores(query, key_tile, query_sum, key_sum, query_zero_point, key_zero_point, HEAD)
    scores = exact.to(tl.float32) * score_scale
    allowed = present[None, :]
    if CAUSAL:
        allowed = allowed & (column[None, :] <= row[:, None])
    if mask is not None:
        entry = tl.load(mask + mask_row[:, None] + (column * mask_stride_key)[None, :], mask=allowed, other=0)
        if mask.dtype.element_ty == tl.int8:  # a boolean mask
            allowed = allowed & (entry != 0)
        else:
            scores = scores + entry.to(tl.float32)
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def attention(
    query,
    key,
    value,
    key_sums,
    value_sums,
    mask,
    output,
    queries,
    keys,
    heads,
    mask_stride_batch,
    mask_stride_head,
    mask_stride_query,
    mask_stride_key,
    score_scale,
    output_scale,
    query_zero_point,
    key_zero_point,
    value_zero_point,
    qmax,
    CAUSAL: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M rows of one head's output.

    Args:
      query, key, value: [batch * heads, length, head size] int8.
      key_sums: [batch * heads, keys] int32, sums of k over the head; value_sums: [batch * heads, VALUE_HEAD] over keys.
      mask: any floating dtype (added) or int8 (boolean), strides in elements, 0 where it is broadcast; None without.
      output: [batch * heads, queries, VALUE_HEAD]. Rows whose keys are all masked give 0.
      score_scale: s_q s_k / sqrt(head size); output_scale: s_v / qmax.
    """
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = row < queries
    element, feature = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_D)
    long_head = head.to(tl.int64)
    query_tile = tl.load(
        query + (long_head * queries + row)[:, None] * HEAD + element[None, :],
        mask=here[:, None] & (element < HEAD)[None, :],
        other=0,
    )
    query_sum = tl.sum(query_tile.to(tl.int32), axis=1)
    key += long_head * keys * HEAD
    value += long_head * keys * VALUE_HEAD
    key_sums += long_head * keys
    mask_row = head // heads * mask_stride_batch + head % heads * mask_stride_head + row * mask_stride_query
    mask_row = tl.where(here, mask_row, 0)

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, keys, BLOCK_N):
        scores = _scores(
            query_tile, query_sum, key, key_sums, mask, row, start, mask_row, mask_stride_key, score_scale,
            query_zero_point, key_zero_point, keys, CAUSAL, HEAD, BLOCK_N, BLOCK_E,
        )  # fmt: skip
        new = tl.maximum(largest, tl.max(scores, axis=1))
        reference = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - reference) + tl.sum(tl.exp(scores - reference[:, None]), axis=1)
        largest = new
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    inverse = qmax / tl.where(total == 0.0, 1.0, total)

    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
    code_sum = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, keys, BLOCK_N):
        scores = _scores(
            query_tile, query_sum, key, key_sums, mask, row, start, mask_row, mask_stride_key, score_scale,
            query_zero_point, key_zero_point, keys, CAUSAL, HEAD, BLOCK_N, BLOCK_E,
        )  # fmt: skip
        code = round_half_even(tl.exp(scores - reference[:, None]) * inverse[:, None], 255.0).to(tl.int32)
        code_sum += tl.sum(code, axis=1)
        column = start + tl.arange(0, BLOCK_N)
        value_tile = tl.load(
            value + column.to(tl.int64)[:, None] * VALUE_HEAD + feature[None, :],
            mask=(column < keys)[:, None] & (feature < VALUE_HEAD)[None, :],
            other=0,
        )
        accumulator = tl.dot((code - 128).to(tl.int8), value_tile, accumulator, out_dtype=tl.int32)
    value_sum = tl.load(value_sums + long_head * VALUE_HEAD + feature, mask=feature < VALUE_HEAD, other=0)
    accumulator += 128 * value_sum[None, :] - (code_sum * value_zero_point)[:, None]
    tl.store(
        output + (long_head * queries + row)[:, None] * VALUE_HEAD + feature[None, :],
        (accumulator.to(tl.float32) * output_scale).to(output.dtype.element_ty),
        mask=here[:, None] & (feature < VALUE_HEAD)[None, :],
    )


@triton.jit
def score_accumulators(
    query, key, key_sums, output, queries, keys, query_zero_point, key_zero_point,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The int32 scores of one head [queries, keys] that `attention` computes, for comparison with the reference."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    element = tl.arange(0, BLOCK_E)
    in_head = (element < HEAD)[None, :]
    query_tile = tl.load(
        query + row[:, None] * HEAD + element[None, :], mask=(row < queries)[:, None] & in_head, other=0
    )
    key_tile = tl.load(
        key + column[:, None] * HEAD + element[None, :], mask=(column < keys)[:, None] & in_head, other=0
    )
    key_sum = tl.load(key_sums + column, mask=column < keys, other=0)
    query_sum = tl.sum(query_tile.to(tl.int32), axis=1)
    exact = centred_scores(query_tile, key_tile, query_sum, key_sum, query_zero_point, key_zero_point, HEAD)
    inside = (row < queries)[:, None] & (column < keys)[None, :]
    tl.store(output + row[:, None] * keys + column[None, :], exact, mask=inside)
