"""Corrected biases become the layers' own."""

from __future__ import annotations

from torch import fx

from qdiff_fx.fake_quantize import BiasCorrection
from qdiff_fx.graph.edit import get_tensor, set_tensor
from qdiff_fx.passes.base import PassContext, RewritePass


class FoldBiasCorrections(RewritePass[fx.Node]):
    """conv/linear(x, W, correct(b)) becomes conv/linear(x, W, b'); the plan holds b' alone."""

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> fx.Node | None:
        correction = node.op == "call_module" and graph_module.get_submodule(str(node.target))
        return node if isinstance(correction, BiasCorrection) else None

    def rewrite(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> None:
        correction, own = graph_module.get_submodule(str(match.target)), match.args[0] if match.args else None
        assert isinstance(correction, BiasCorrection)
        bias = get_tensor(graph_module, own.target).detach() if isinstance(own, fx.Node) else None
        name = f"{match.target}_corrected"
        set_tensor(graph_module, name, correction.corrected(bias))
        with graph_module.graph.inserting_before(match):
            folded = graph_module.graph.get_attr(name)
        folded.meta["val"] = match.meta["val"]
        match.replace_all_uses_with(folded)
        graph_module.graph.erase_node(match)
