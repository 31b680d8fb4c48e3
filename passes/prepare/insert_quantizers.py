"""Put the quantizers that the policies ask for into the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qdiff_fx.fake_quantize import ActivationQuantizer, AttentionQuantizer, WeightQuantizer
from qdiff_fx.graph.edit import LayerCall, add_module, copy_provenance, layer_call, shape_of
from qdiff_fx.graph.meta import ATTENTION, LAYER, LayerPolicy
from qdiff_fx.numerics.spec import QuantSpec
from qdiff_fx.passes.base import GraphPass, PassContext, PassResult, Refusal, finish

aten = torch.ops.aten

QuantizerKey = tuple[fx.Node, QuantSpec, int]


class InsertQuantizers(GraphPass):
    """Every annotated layer reads its input and weight through quantizers; every annotated attention becomes one.

    A tensor that several layers read with equal specs and channel axes is quantized once; so is a shared weight.
    Left alone: operands whose policy says carrier, attention whose queries share key heads.
    """

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        activations: dict[QuantizerKey, fx.Node] = {}
        weights: dict[tuple[Any, QuantSpec], fx.Node] = {}
        rewrites: list[str] = []
        refusals: list[Refusal] = []
        for node in list(graph_module.graph.nodes):
            policy, layer = LAYER.get(node), layer_call(node)
            if policy is not None and layer is not None and layer.weight.op == "get_attr" and policy.weight is not None:
                _quantize_layer(graph_module, layer, policy, activations, weights, context)
                rewrites.append(node.name)
            elif ATTENTION.get(node) is not None and node.kwargs.get("enable_gqa"):
                refusals.append(Refusal(node=node.name, reason="enable_gqa=True: its heads are not those of its keys"))
            elif ATTENTION.get(node) is not None and _quantize_attention(graph_module, node, context):
                rewrites.append(node.name)
        if rewrites:
            finish(graph_module)
        return PassResult(name=self.name, modified=bool(rewrites), rewrites=tuple(rewrites), refusals=tuple(refusals))


def _quantize_layer(
    graph_module: fx.GraphModule,
    layer: LayerCall,
    policy: LayerPolicy,
    activations: dict[QuantizerKey, fx.Node],
    weights: dict[tuple[Any, QuantSpec], fx.Node],
    context: PassContext,
) -> None:
    config = context.config
    assert policy.weight is not None
    weight_key = (layer.weight.target, policy.weight)
    if weight_key not in weights:
        quantizer = WeightQuantizer(
            policy.name, policy.weight, observer=config.weight_observer, groups=layer.groups, seed=config.seed
        )
        weights[weight_key] = _call_after(graph_module, layer.weight, "weight_quantizer", quantizer)
    layer.node.update_arg(1, weights[weight_key])
    if policy.activation is None:
        return
    rank = len(shape_of(layer.input) or ())
    key = (layer.input, policy.activation, layer.channel_axis % rank)
    if key not in activations:
        observing = ActivationQuantizer(
            f"{policy.name}.input",
            policy.activation,
            observer=config.activation_observer,
            channel_axis=layer.channel_axis,
            noise_level=context.noise_level,
            seed=config.seed,
        )
        activations[key] = _call_after(graph_module, layer.input, "activation_quantizer", observing)
    layer.node.update_arg(0, activations[key])


def _call_after(graph_module: fx.GraphModule, source: fx.Node, kind: str, quantizer: torch.nn.Module) -> fx.Node:
    """A call of `quantizer` on `source`, right behind it."""
    name = add_module(graph_module, f"{kind}_{source.name}", quantizer)
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    after = inputs[-1] if source in inputs else source
    with graph_module.graph.inserting_after(after):
        node = graph_module.graph.call_module(name, (source,))
    copy_provenance(source, node)
    node.meta["val"] = source.meta["val"]
    return node


def _quantize_attention(graph_module: fx.GraphModule, node: fx.Node, context: PassContext) -> bool:
    """Replace an annotated attention; False where it is replaced already or stays in the carrier type."""
    policy = ATTENTION.require(node)
    if node.op != "call_function" or (policy.query_key_value is None and policy.probabilities is None):
        return False
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    defaults: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    arguments = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    quantizer = AttentionQuantizer(
        policy.name,
        policy.query_key_value,
        policy.probabilities,
        observer=context.config.activation_observer,
        noise_level=context.noise_level,
        seed=context.config.seed,
    )
    name = add_module(graph_module, f"attention_quantizer_{node.name}", quantizer)
    arguments.pop("dropout_p")
    arguments.pop("enable_gqa", None)
    operands = tuple(arguments.pop(key) for key in ("query", "key", "value", "attn_mask", "is_causal", "scale"))
    with graph_module.graph.inserting_before(node):
        call = graph_module.graph.call_module(name, operands)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph_module.graph.erase_node(node)
    return True
