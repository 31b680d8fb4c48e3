"""Give layers with rounded weights the biases that belong to them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from qdiff_fx.fake_quantize import BiasCorrection
from qdiff_fx.graph.edit import add_module, copy_provenance, layer_call, set_bias
from qdiff_fx.graph.meta import LAYER
from qdiff_fx.passes.base import GraphPass, PassContext, PassResult, finish


class CorrectBiases(GraphPass):
    """conv/linear(x, fake_quantize(W), b) becomes conv/linear(x, fake_quantize(W), correct(b)); b may be None.

    Args:
      corrections: [C_out] each, by the layer's node. What other layers had is taken away.
    """

    def __init__(self, corrections: Mapping[str, Tensor]) -> None:
        self.corrections = corrections

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        rewrites = []
        for node in list(graph_module.graph.nodes):
            if layer_call(node) is None:
                continue
            dropped = drop_correction(graph_module, node)
            if node.name in self.corrections:
                _correct(graph_module, node, self.corrections[node.name])
            if dropped or node.name in self.corrections:
                rewrites.append(node.name)
        if rewrites:
            finish(graph_module)
        return PassResult(name=self.name, modified=bool(rewrites), rewrites=tuple(rewrites))


def bias_correction(graph_module: fx.GraphModule, node: fx.Node) -> BiasCorrection | None:
    """What corrects the bias of a layer, or None."""
    call = layer_call(node)
    if call is None or call.bias is None or call.bias.op != "call_module":
        return None
    module = graph_module.get_submodule(str(call.bias.target))
    return module if isinstance(module, BiasCorrection) else None


def drop_correction(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Give a layer its own bias back; returns whether it had a correction."""
    call = layer_call(node)
    if call is None or call.bias is None or bias_correction(graph_module, node) is None:
        return False
    set_bias(node, call.bias_source)
    if not call.bias.users:
        graph_module.graph.erase_node(call.bias)
    return True


def _correct(graph_module: fx.GraphModule, node: fx.Node, correction: Tensor) -> None:
    call = layer_call(node)
    assert call is not None
    name = add_module(graph_module, f"{node.name}_bias", BiasCorrection(LAYER.require(node).name, correction))
    with graph_module.graph.inserting_before(node):
        corrected = graph_module.graph.call_module(name, () if call.bias is None else (call.bias,))
    copy_provenance(node, corrected)
    if call.bias is not None:
        corrected.meta["val"] = call.bias.meta["val"]
    else:
        output = node.meta["val"]
        corrected.meta["val"] = output.new_empty(correction.shape)
    set_bias(node, corrected)
