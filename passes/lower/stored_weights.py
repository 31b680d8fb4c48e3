"""What lowerings of weights in layers with a carrier-type input have in common."""

from __future__ import annotations

import torch
from torch import fx

from qdiff_fx.passes.base import PassContext, RewritePass

qdiff = torch.ops.qdiff


class StoredWeightPass(RewritePass[fx.Node]):
    """Finds every qdiff.dequantize_weight; subclasses say what becomes of it.

    Left alone: weights that are computed in the graph.
    """

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> fx.Node | None:
        return node if node.target is qdiff.dequantize_weight.default else None

    def check(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        return computed_operands(match.all_input_nodes)


def computed_operands(nodes: list[fx.Node]) -> str | None:
    """Why operands that should be stored tensors cannot be read; None if all are."""
    computed = [item.name for item in nodes if item.op != "get_attr"]
    return f"{', '.join(computed)}: computed, not stored" if computed else None
