"""Integer layers on oneDNN's kernels, weights prepacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qdiff_fx.graph.edit import create_call, shape_of
from qdiff_fx.graph.propagate import size_hint
from qdiff_fx.kernels.x86 import OUTPUT_DTYPES, prepack_conv2d, prepack_linear
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.lower.integer_layers import IntegerLayer, IntegerLayerPass, add_constant, stored_tensor

aten = torch.ops.aten
qdiff = torch.ops.qdiff


class LowerX86Layers(IntegerLayerPass):
    """qdiff.conv2d and qdiff.linear become qdiff.x86_conv2d and qdiff.x86_linear.

    4-bit weights are unpacked and their zero points and shifts folded into int8; every weight is prepacked into a
    non-persistent buffer, for the shapes of the example call. A bias is kept in float32, which is what the kernel
    adds. Carrier types that oneDNN does not write are cast from float32.

    Left alone: layers whose weights are computed in the graph.
    """

    def rewrite(self, match: IntegerLayer, graph_module: fx.GraphModule, context: PassContext) -> None:
        graph, layer = graph_module.graph, match.node
        weight = match.integers(graph_module)
        weight_scale, bias_value = (stored_tensor(graph_module, item) for item in (match.weight_scale, match.bias))
        assert weight_scale is not None
        kernel_dtype = match.output_dtype if match.output_dtype in OUTPUT_DTYPES else torch.float32
        if match.is_conv2d:
            x_shape = [size_hint(size) for size in shape_of(match.x) or ()]
            prepacked = prepack_conv2d(weight, weight_scale, *match.geometry, x_shape)
            tail: tuple[Any, ...] = (match.weight_shape, *match.geometry, kernel_dtype)
            target = qdiff.x86_conv2d.default
        else:
            prepacked = prepack_linear(weight)
            tail = (match.weight_shape[0], kernel_dtype)
            target = qdiff.x86_linear.default
        with graph.inserting_before(layer):
            # Packed weights have no fake form.
            packed = add_constant(graph_module, f"x86_{layer.name}_weight", prepacked)
            bias = match.bias
            if bias_value is not None and bias_value.dtype != torch.float32:
                bias = add_constant(graph_module, f"x86_{layer.name}_bias", bias_value.to(torch.float32))
            operands = (match.x, packed, match.weight_scale, bias, match.x_scale, match.x_zero_point, *tail)
            node = graph.call_function(target, operands)
            node.meta = dict(layer.meta)
            result = node
            if kernel_dtype != match.output_dtype:
                node.meta["val"] = layer.meta["val"].to(kernel_dtype)
                result = create_call(graph, aten.to.dtype, (node, match.output_dtype), like=layer)
        layer.replace_all_uses_with(result)
        graph.erase_node(layer)
