"""Attention: the plugin's fused kernel in the carrier type, or spelled out over simulated integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset15 as opset

from qdiff_fx.kernels.openvino_nodes.values import Call, constant, output

aten = torch.ops.aten
qdiff = torch.ops.qdiff
Emit = Callable[..., Any]


def _fused(
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if enable_gqa:
        raise call.refuse("grouped queries")
    rank = len(call.value.shape)
    operands = [output(item) for item in (query, key, value)]
    mask = None if mask is None else output(mask)
    # The fused kernel is for [B, heads, L, D].
    lifted = rank == 3
    if lifted:
        operands = [opset.unsqueeze(item, constant(1)).output(0) for item in operands]
        mask = opset.unsqueeze(mask, constant(1)).output(0) if mask is not None and _rank(mask) == 3 else mask
    arguments = [mask, None if scale is None else constant(float(scale), ov.Type.f32)]
    if arguments[1] is not None and mask is None:
        arguments[0] = constant(0.0, ov.Type.f32)  # a scale is only read behind a mask
    while arguments and arguments[-1] is None:
        arguments.pop()
    result = opset.scaled_dot_product_attention(*operands, *arguments, causal=is_causal)
    result.set_friendly_name(call.node.name)
    return opset.squeeze(result, constant(1)).output(0) if lifted else result.output(0)


def _rank(tensor: Any) -> int:
    return int(tensor.get_partial_shape().rank.get_length())


def _simulated(
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    is_causal: bool,
    scale: float | None,
    operand_scales: Sequence[float],
    operand_zero_points: Sequence[int],
    operand_bits: int,
    softmax_bits: int,
) -> Any:
    """What `reference.attention` computes: operands and probabilities on their grids, products of real numbers."""
    if is_causal:
        raise call.refuse("a causal mask over quantized operands")
    operands = [output(item) for item in (query, key, value)]
    if operand_scales:
        last = 2**operand_bits - 1
        operands = [
            _on_grid(item, -zero_point * step, (last - zero_point) * step, last + 1)
            for item, step, zero_point in zip(operands, operand_scales, operand_zero_points, strict=True)
        ]
    query, key, value = operands
    factor = 1 / math.sqrt(call.fake(0).shape[-1]) if scale is None else scale
    weights = opset.multiply(opset.matmul(query, key, False, True), constant(factor, ov.Type.f32))
    if mask is not None:
        weights = _masked(weights, output(mask))
    probabilities = opset.softmax(weights, len(call.value.shape) - 1).output(0)
    if softmax_bits:
        probabilities = _on_grid(probabilities, 0.0, 1.0, 2**softmax_bits)
    result = opset.matmul(probabilities, value, False, False)
    result.set_friendly_name(call.node.name)
    return result.output(0)


def _masked(weights: Any, mask: Any) -> Any:
    if mask.get_element_type() == ov.Type.boolean:
        mask = opset.select(mask, constant(0.0, ov.Type.f32), constant(-math.inf, ov.Type.f32))
    return opset.add(weights, mask)


def _on_grid(x: Any, low: float, high: float, levels: int) -> Any:
    bounds = [constant(np.float32(item)) for item in (low, high)]
    return opset.fake_quantize(x, *bounds, *bounds, levels).output(0)


ATTENTION: Mapping[Any, Emit] = {
    aten.scaled_dot_product_attention.default: _fused,
    qdiff.attention.default: _simulated,
}
