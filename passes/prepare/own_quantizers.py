"""Give single layers that share a quantized tensor a quantize step of their own."""

from __future__ import annotations

import copy

from torch import fx

from qdiff_fx.fake_quantize import ActivationQuantizer
from qdiff_fx.graph.edit import add_module, copy_provenance, layer_call
from qdiff_fx.passes.base import GraphPass, PassContext, PassResult, Refusal, finish


class GiveOwnQuantizers(GraphPass):
    """Each named layer reads the tensor through a copy of the quantizer that it shared.

    `created` maps the layers to their new quantizers; what was observed and fitted is copied along.

    Left alone: layers whose input has no quantizer, or one that nothing else reads.
    """

    def __init__(self, layers: tuple[fx.Node, ...]) -> None:
        self.layers = layers
        self.created: dict[fx.Node, ActivationQuantizer] = {}

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        rewrites: list[str] = []
        refusals: list[Refusal] = []
        for layer in self.layers:
            call = layer_call(layer)
            shared = None if call is None else call.input
            quantizer = (
                graph_module.get_submodule(str(shared.target)) if shared and shared.op == "call_module" else None
            )
            if shared is None or not isinstance(quantizer, ActivationQuantizer):
                refusals.append(Refusal(node=layer.name, reason="its input has no quantizer"))
            elif len(shared.users) == 1:
                refusals.append(Refusal(node=layer.name, reason="its quantizer is its own already"))
            else:
                own = copy.deepcopy(quantizer)
                own.noise_level = quantizer.noise_level  # one for the whole model
                name = add_module(graph_module, str(shared.target), own)
                with graph_module.graph.inserting_before(layer):
                    node = graph_module.graph.call_module(name, shared.args)
                copy_provenance(layer, node)
                node.meta["val"] = shared.meta.get("val")
                layer.replace_input_with(shared, node)
                self.created[layer] = own
                rewrites.append(layer.name)
        if rewrites:
            finish(graph_module)
        return PassResult(name=self.name, modified=bool(rewrites), rewrites=tuple(rewrites), refusals=tuple(refusals))
