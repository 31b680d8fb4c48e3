"""Integer layers that run in the carrier type instead, on their weight dequantized once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.graph.edit import create_call, get_tensor
from qdiff_fx.graph.meta import FALLBACK
from qdiff_fx.numerics.affine import along_axis
from qdiff_fx.numerics.weights import expand_input_channels
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.lower.carrier_weights import channels_last
from qdiff_fx.passes.lower.integer_layers import (
    IntegerLayer,
    IntegerLayerPass,
    add_constant,
    stored_tensor,
    value_like,
)

aten = torch.ops.aten
qdiff = torch.ops.qdiff


class KeepChosenLayersInCarrier(IntegerLayerPass):
    """A layer that `context.carrier_layers` names runs in the carrier type.

    Left alone: every other layer; every layer under strict=True; layers whose codes or constants are computed otherwise
    than by a quantize step.
    """

    def check(self, match: IntegerLayer, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        if (reason := super().check(match, graph_module, context)) is not None:
            return reason
        if context.strict or match.node.name not in context.carrier_layers:
            return "integer kernels are asked for"
        return None if match.x.target is qdiff.quantize.default else f"{match.x.name}: no quantize step"

    def rewrite(self, match: IntegerLayer, graph_module: fx.GraphModule, context: PassContext) -> None:
        run_in_carrier(match, graph_module, context.carrier_layers[match.node.name])


def run_in_carrier(match: IntegerLayer, graph_module: fx.GraphModule, reason: str) -> None:
    """Put a convolution or linear of the carrier type in the layer's place; the report tells the reason."""
    graph, layer = graph_module.graph, match.node
    source: Any = match.x.args[0]
    name = f"kept_{layer.name}_weight"
    with graph.inserting_before(layer):
        if source.meta["val"].dtype != match.output_dtype:  # timestep arithmetic is float32 in every carrier
            source = create_call(graph, aten.to.dtype, (source, match.output_dtype), like=source)
        weight = add_constant(graph_module, name, carrier_weight(match, graph_module))
        weight.meta["val"] = value_like(layer, get_tensor(graph_module, name))
        geometry = match.geometry if match.is_conv2d else ()
        target = aten.conv2d.default if match.is_conv2d else aten.linear.default
        node = create_call(graph, target, (source, weight, match.bias, *geometry), like=layer)
    for key, value in layer.meta.items():
        node.meta.setdefault(key, value)
    FALLBACK.set(node, reason)
    layer.replace_all_uses_with(node)
    graph.erase_node(layer)


def carrier_weight(layer: IntegerLayer, graph_module: fx.GraphModule) -> Tensor:
    """The real weight: int8 * s_w[o] / m_c, with 1 / m_c = inv_scale_c * s_x; channels_last for a convolution."""
    integers = layer.integers(graph_module).to(torch.float32)
    inv_scale, scale = (stored_tensor(graph_module, item) for item in (layer.x.args[1], layer.weight_scale))
    assert inv_scale is not None and scale is not None
    weight = integers * along_axis(scale, integers.ndim, 0)
    if inv_scale.ndim:
        weight = weight * expand_input_channels(inv_scale * layer.x_scale, tuple(weight.shape), layer.groups)
    return channels_last(weight.to(layer.output_dtype))
