"""Quantized attentions become one operator each."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qdiff_fx.fake_quantize import AttentionQuantizer
from qdiff_fx.graph.edit import create_call
from qdiff_fx.graph.meta import ATTENTION
from qdiff_fx.passes.base import PassContext, RewritePass


class ConvertAttention(RewritePass[fx.Node]):
    """A calibrated AttentionQuantizer call becomes qdiff.attention with its grids as constants."""

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> fx.Node | None:
        quantizer = node.op == "call_module" and graph_module.get_submodule(str(node.target))
        return node if isinstance(quantizer, AttentionQuantizer) else None

    def rewrite(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> None:
        quantizer = graph_module.get_submodule(str(match.target))
        assert isinstance(quantizer, AttentionQuantizer)
        names: Any = ("query", "key", "value", "mask", "is_causal", "scale")
        defaults = {"mask": None, "is_causal": False, "scale": None}
        arguments = {**defaults, **dict(zip(names, match.args, strict=False)), **match.kwargs}
        operands = [
            item for item in (quantizer.operand(name) for name in ("query", "key", "value")) if item is not None
        ]
        args = (
            *(arguments[name] for name in names),
            [float(item.scale) for item in operands],
            [int(item.zero_point) for item in operands],
            operands[0].spec.bits if operands else 0,
            quantizer.probabilities.bits if quantizer.probabilities is not None else 0,
        )
        with graph_module.graph.inserting_before(match):
            call = create_call(graph_module.graph, torch.ops.qdiff.attention.default, args, like=match)
        if (policy := ATTENTION.get(match)) is not None:
            ATTENTION.set(call, policy)
        match.replace_all_uses_with(call)
        graph_module.graph.erase_node(match)
