"""Decide how every layer and attention is quantized: policy as data, written into node metadata."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import fx

from qdiff_fx.config import CARRIER_BITS, LayerRule
from qdiff_fx.errors import QDiffWarning
from qdiff_fx.graph.edit import LayerCall, layer_call, shape_of
from qdiff_fx.graph.meta import ATTENTION, LAYER, MODULE_PATH, SPLIT_PART, AttentionPolicy, LayerPolicy
from qdiff_fx.numerics.spec import activation_spec, probability_spec, weight_spec
from qdiff_fx.passes.analysis import depends_on_sample, output_layers, reads_sample
from qdiff_fx.passes.base import GraphPass, PassContext, PassResult, Refusal

aten = torch.ops.aten

_GUARDED_BITS = 8
"""Width of weights and activations that the structural rules protect."""


class AnnotatePolicies(GraphPass):
    """Write a LayerPolicy on every conv and linear and an AttentionPolicy on every attention.

    Structural defaults, which LayerRules override: layers that read the noisy sample and layers that make the output
    get 8-bit weights and keep their input in the carrier type (x_t's rounding noise is amplified by 1 / sigma_t at
    the end of sampling); layers that do not depend on the sample but on the noise level are W8A8.

    Left alone: weights computed in the graph, padding="same" that pads unevenly, transposed and 3-D convolutions.
    """

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        config, names, refusals = context.config, _UniqueNames(), list[Refusal]()
        used: dict[LayerRule, None] = {}
        modified = False
        outputs = output_layers(graph_module.graph, context.signature)
        for node in graph_module.graph.nodes:
            path = MODULE_PATH.get(node) or ""
            if (layer := layer_call(node)) is not None:
                if layer.weight.op != "get_attr":
                    refusals.append(Refusal(node=node.name, reason="its weight is computed in the graph"))
                    continue
                if layer.padding == "same" and _uneven_padding(layer):
                    refusals.append(Refusal(node=node.name, reason='padding="same" with an even kernel pads unevenly'))
                    continue
                weight, activation, reason = _structural_bits(node, layer.input, outputs, context)
                for rule in _matching(config.rules, path, layer.operator, used):
                    weight = weight if rule.weight_bits is None else rule.weight_bits
                    activation = activation if rule.activation_bits is None else rule.activation_bits
                    reason = f"rule {rule.module or '*'} {rule.operator or ''}".strip()
                if weight == CARRIER_BITS:
                    activation = CARRIER_BITS  # a floating weight has no use for an integer input
                part = SPLIT_PART.get(node)
                policy = LayerPolicy(
                    name=names.take((path or node.name) + (f"#{part.index}" if part else "")),
                    operator=layer.operator,
                    weight=weight_spec(weight) if weight != CARRIER_BITS else None,
                    activation=activation_spec(activation) if activation != CARRIER_BITS else None,
                    reason=reason,
                )
                modified |= LAYER.get(node) != policy
                LAYER.set(node, policy)
            elif node.target is aten.scaled_dot_product_attention.default:
                bits = config.query_key_value_bits
                for rule in _matching(config.rules, path, "attention", used):
                    bits = bits if rule.activation_bits is None else rule.activation_bits
                softmax = CARRIER_BITS if bits == CARRIER_BITS else config.softmax_bits
                attention = AttentionPolicy(
                    name=names.take(path or node.name),
                    query_key_value=activation_spec(bits) if bits != CARRIER_BITS else None,
                    probabilities=probability_spec(softmax) if softmax != CARRIER_BITS else None,
                )
                modified |= ATTENTION.get(node) != attention
                ATTENTION.set(node, attention)
        for rule in config.rules:
            if rule not in used:
                warnings.warn(
                    f"{rule} matches no layer of this model; see `qdiff-fx inspect`", QDiffWarning, stacklevel=2
                )
        return PassResult(name=self.name, modified=modified, refusals=tuple(refusals))


def _structural_bits(
    node: fx.Node, source: fx.Node, outputs: Iterable[fx.Node], context: PassContext
) -> tuple[int, int, str]:
    """Weight bits, activation bits and the reason, before any rule."""
    config = context.config
    weight, activation = config.weight_bits, config.activation_bits
    if config.quantize_boundaries:
        return weight, activation, "config"
    guarded = CARRIER_BITS if weight == CARRIER_BITS else _GUARDED_BITS
    if reads_sample(source, context.signature):
        return guarded, CARRIER_BITS, "boundary: reads the noisy sample"
    if node in outputs:
        return guarded, CARRIER_BITS, "boundary: makes the output"
    if _embeds_noise_level(node, context):
        return guarded, CARRIER_BITS if activation == CARRIER_BITS else _GUARDED_BITS, "embeds the noise level"
    return weight, activation, "config"


def _embeds_noise_level(node: fx.Node, context: PassContext) -> bool:
    timestep = context.signature.timestep
    if timestep is None or depends_on_sample(node, context.signature):
        return False
    pending, seen = [node], dict[fx.Node, None]()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen[current] = None
        if current.op == "placeholder" and current.name == timestep:
            return True
        pending.extend(current.all_input_nodes)
    return False


def _matching(
    rules: tuple[LayerRule, ...], path: str, operator: str, used: dict[LayerRule, None]
) -> Iterable[LayerRule]:
    for rule in rules:
        if rule.matches(path, operator):
            used[rule] = None
            yield rule


def _uneven_padding(layer: LayerCall) -> bool:
    kernel = (shape_of(layer.weight) or ())[2:]
    dilations = [layer.dilation] * len(kernel) if isinstance(layer.dilation, int) else [*layer.dilation] * len(kernel)
    return any(dilation * (size - 1) % 2 for dilation, size in zip(dilations, kernel, strict=False))


class _UniqueNames:
    """Hands out each name once; a module that is called twice gets "path", "path@1"."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def take(self, name: str) -> str:
        count = self.counts.get(name, 0)
        self.counts[name] = count + 1
        return name if count == 0 else f"{name}@{count}"
