"""Layers that the performance model leaves to the carrier type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.graph.edit import create_call, get_tensor
from qdiff_fx.graph.meta import FALLBACK
from qdiff_fx.kernels.cuda_model import carrier_layer, integer_layer
from qdiff_fx.numerics.affine import along_axis
from qdiff_fx.numerics.weights import expand_input_channels
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.lower.cuda_target import layer_work, target_gpu
from qdiff_fx.passes.lower.integer_layers import IntegerLayer, IntegerLayerPass, add_constant, stored_tensor, value_like

aten = torch.ops.aten
qdiff = torch.ops.qdiff


class KeepSlowLayersInCarrier(IntegerLayerPass):
    """A layer that the model finds faster in the carrier type runs there, on its weight dequantized once.

    Left alone: layers that are predicted to win on integers; every layer under strict=True, in float32 (which no
    tensor core multiplies), or where the interpreter stands in for a GPU; layers whose codes or constants are computed
    otherwise than by a quantize step.
    """

    def check(self, match: IntegerLayer, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        if (reason := super().check(match, graph_module, context)) is not None:
            return reason
        gpu = target_gpu(graph_module)
        if context.strict or gpu is None or match.output_dtype == torch.float32:
            return "integer kernels are asked for"
        if match.x.target is not qdiff.quantize.default:
            return f"{match.x.name}: no quantize step"
        work = layer_work(match)
        if integer_layer(work, gpu).predicted <= carrier_layer(work, gpu).predicted:
            return "predicted to win on integers"
        return None

    def rewrite(self, match: IntegerLayer, graph_module: fx.GraphModule, context: PassContext) -> None:
        graph, layer = graph_module.graph, match.node
        gpu, work = target_gpu(graph_module), layer_work(match)
        assert gpu is not None
        source: Any = match.x.args[0]
        name = f"cuda_{layer.name}_carrier"
        with graph.inserting_before(layer):
            weight = add_constant(graph_module, name, carrier_weight(match, graph_module))
            weight.meta["val"] = value_like(layer, get_tensor(graph_module, name))
            geometry = match.geometry if match.is_conv2d else ()
            target = aten.conv2d.default if match.is_conv2d else aten.linear.default
            node = create_call(graph, target, (source, weight, match.bias, *geometry), like=layer)
        for key, value in layer.meta.items():
            node.meta.setdefault(key, value)
        times = (1e6 * model(work, gpu).predicted for model in (integer_layer, carrier_layer))
        FALLBACK.set(node, "predicted {:.1f} us on integers, {:.1f} us in the carrier type".format(*times))
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
    weight = weight.to(layer.output_dtype)
    return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight
