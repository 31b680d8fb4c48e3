"""What bits are decided for: weights and layer inputs, each with its layers, bytes and multiplications."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qdiff_fx.fake_quantize import ActivationQuantizer, AttentionQuantizer, BiasCorrection, WeightQuantizer
from qdiff_fx.graph.edit import LayerCall, get_tensor, layer_call
from qdiff_fx.graph.meta import LAYER
from qdiff_fx.graph.propagate import size_hint
from qdiff_fx.passes.prepare.correct_biases import bias_correction


@dataclass(frozen=True, kw_only=True)
class WeightUnit:
    """One stored weight.

    Args:
      target: the quantizer's name in the graph module.
      layers: names of the layers that read it.
      corrections: of their biases.
    """

    target: str
    quantizer: WeightQuantizer
    weight: Tensor
    layers: tuple[str, ...]
    corrections: tuple[BiasCorrection, ...] = ()

    @property
    def name(self) -> str:
        """The first layer's name."""
        return self.layers[0]

    def bytes_at(self, bits: int) -> int:
        """Bytes of the codes at this width; 5 to 8 bits are stored as int8."""
        return math.ceil(self.weight.numel() / 2) if bits <= 4 else self.weight.numel()

    @property
    def bytes(self) -> int:
        """Bytes of the codes as they are now."""
        return self.bytes_at(self.quantizer.spec.bits)


@dataclass(frozen=True, kw_only=True)
class InputUnit:
    """One quantized layer input; several layers may share it.

    Args:
      target: the quantizer's name in the graph module.
      layers: names of the layers that read it.
      multiplications: of those layers for one sample, at the captured size.
    """

    target: str
    quantizer: ActivationQuantizer
    layers: tuple[str, ...]
    multiplications: int

    @property
    def name(self) -> str:
        """The first layer's name."""
        return self.layers[0]


def weight_units(graph_module: fx.GraphModule) -> tuple[WeightUnit, ...]:
    """Every quantized weight in execution order."""
    units = []
    for node, quantizer in _quantizers(graph_module, WeightQuantizer):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        layers = tuple(LAYER.require(user).name for user in node.users)
        weight = get_tensor(graph_module, source.target)
        corrections = (bias_correction(graph_module, user) for user in node.users)
        units.append(
            WeightUnit(
                target=str(node.target),
                quantizer=quantizer,
                weight=weight,
                layers=layers,
                corrections=tuple(item for item in corrections if item is not None),
            )
        )
    return tuple(units)


def input_units(graph_module: fx.GraphModule) -> tuple[InputUnit, ...]:
    """Every quantized layer input in execution order; operands of attentions are not among them."""
    units = []
    for node, quantizer in _quantizers(graph_module, ActivationQuantizer):
        calls = [call for user in node.users if (call := layer_call(user)) is not None]
        if calls:
            units.append(
                InputUnit(
                    target=str(node.target),
                    quantizer=quantizer,
                    layers=tuple(LAYER.require(call.node).name for call in calls),
                    multiplications=sum(multiplications(call) for call in calls),
                )
            )
    return tuple(units)


def attention_quantizers(graph_module: fx.GraphModule) -> Iterator[tuple[str, AttentionQuantizer]]:
    """Every quantized attention with its quantizer's name in the graph module, in execution order."""
    return ((str(node.target), quantizer) for node, quantizer in _quantizers(graph_module, AttentionQuantizer))


def total_multiplications(graph_module: fx.GraphModule) -> int:
    """Of all convs and linears, for one sample at the captured size."""
    calls = (layer_call(node) for node in graph_module.graph.nodes)
    return sum(multiplications(call) for call in calls if call is not None)


def layer_multiplications(graph_module: fx.GraphModule) -> dict[str, int]:
    """Multiplications of each conv and linear, by its name, for one sample at the captured size."""
    calls = (layer_call(node) for node in graph_module.graph.nodes)
    return {LAYER.require(call.node).name: multiplications(call) for call in calls if call is not None}


def quantized_multiplications(graph_module: fx.GraphModule) -> dict[str, int]:
    """Multiplications of each layer whose input is quantized, by its name, for one sample at the captured size."""
    calls = (layer_call(user) for node, _ in _quantizers(graph_module, ActivationQuantizer) for user in node.users)
    return {LAYER.require(call.node).name: multiplications(call) for call in calls if call is not None}


def multiplications(call: LayerCall) -> int:
    """Multiplications of a layer for one sample at the captured size: outputs times weights of one output."""
    output, weight = call.node.meta["val"], call.weight.meta["val"]
    per_output = math.prod(int(size) for size in weight.shape[1:])
    return per_output * math.prod(size_hint(size) for size in output.shape[1:])


def _quantizers(graph_module: fx.GraphModule, kind: type[Any]) -> Iterator[tuple[fx.Node, Any]]:
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if isinstance(module, kind):
                yield node, module
