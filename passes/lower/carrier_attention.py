"""Attention in the carrier type."""

from __future__ import annotations

import torch
from torch import fx

from qdiff_fx.graph.edit import create_call
from qdiff_fx.graph.meta import FALLBACK
from qdiff_fx.passes.base import PassContext, RewritePass
from qdiff_fx.passes.lower.integer_layers import replace_call

aten = torch.ops.aten
qdiff = torch.ops.qdiff


class DropAttentionQuantizers(RewritePass[fx.Node]):
    """qdiff.attention becomes scaled_dot_product_attention in the carrier type, without rounding.

    Rounding without integer products only costs.

    Left alone: everything under strict=True, which keeps the simulated quantization.

    Args:
      reason: why rounding without integer products would be all that the quantizers do, for the lowering report.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> fx.Node | None:
        return node if node.target is qdiff.attention.default else None

    def check(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        return "strict=True keeps quantized attention" if context.strict else None

    def rewrite(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> None:
        drop_quantizers(match, graph_module, self.reason)


def drop_quantizers(match: fx.Node, graph_module: fx.GraphModule, reason: str) -> None:
    """Put scaled_dot_product_attention in the place of a qdiff.attention; the report tells the reason."""
    query, key, value, mask, is_causal, scale = match.args[:6]
    graph = graph_module.graph
    with graph.inserting_before(match):
        call = create_call(
            graph,
            aten.scaled_dot_product_attention.default,
            (query, key, value, mask, 0.0, is_causal),
            {"scale": scale},
            like=match,
        )
    replace_call(match, call)
    FALLBACK.set(call, f"quantizers of q, k, v and softmax dropped: {reason}")
