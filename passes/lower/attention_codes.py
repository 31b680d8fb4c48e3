"""Operands of the backends' integer attentions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qdiff_fx.graph.edit import shape_of, tensor_device
from qdiff_fx.numerics.affine import reciprocal
from qdiff_fx.numerics.attention import attention_scale
from qdiff_fx.passes.lower.integer_layers import add_constant, value_like

qdiff = torch.ops.qdiff


def score_scale(match: fx.Node) -> float:
    """What a sum of products of codes is worth in the softmax of a qdiff.attention with quantized operands."""
    arguments: Any = match.args
    query_step, key_step, _ = arguments[6]
    return float(query_step * key_step * attention_scale(arguments[0].meta["val"], arguments[5]))


def operand_codes(match: fx.Node, graph_module: fx.GraphModule, name: str) -> list[fx.Node]:
    """uint8 codes of q, k and v at the graph's insertion point, each by a quantize step of its own.

    Args:
      match: a qdiff.attention with quantized operands.
      name: what the names of the steps' constants start with.
    """
    arguments: Any = match.args
    bits = arguments[8]
    codes = []
    for operand, step, zero_point, letter in zip(arguments[:3], *arguments[6:8], "qkv", strict=True):
        value = reciprocal(torch.tensor(step)).to(tensor_device(graph_module))
        inv_scale = add_constant(graph_module, f"{name}_{letter}_inv_scale", value)
        inv_scale.meta["val"] = value_like(operand, value)
        axis = len(shape_of(operand) or ()) - 1
        node = graph_module.graph.call_function(
            qdiff.quantize.default, (operand, inv_scale, zero_point, 0, 2**bits - 1, axis)
        )
        node.meta = {"val": torch.empty_like(operand.meta["val"], dtype=torch.uint8)}
        codes.append(node)
    return codes
