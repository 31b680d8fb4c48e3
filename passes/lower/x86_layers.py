"""Integer layers on oneDNN's kernels, weights prepacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.graph.edit import create_call, get_tensor, set_tensor, shape_of
from qdiff_fx.graph.propagate import size_hint
from qdiff_fx.kernels.reference import integer_weight
from qdiff_fx.kernels.x86 import OUTPUT_DTYPES, prepack_conv2d, prepack_linear
from qdiff_fx.passes.base import PassContext, RewritePass

aten = torch.ops.aten
qdiff = torch.ops.qdiff


class LowerX86Layers(RewritePass[fx.Node]):
    """qdiff.conv2d and qdiff.linear become qdiff.x86_conv2d and qdiff.x86_linear.

    4-bit weights are unpacked and their zero points and shifts folded into int8; every weight is prepacked into a
    non-persistent buffer, for the shapes of the example call. A bias is kept in float32, which is what the kernel
    adds. Carrier types that oneDNN does not write are cast from float32.

    Left alone: layers whose weights are computed in the graph.
    """

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> fx.Node | None:
        return node if node.target in (qdiff.conv2d.default, qdiff.linear.default) else None

    def check(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        constants = [item for item in match.args[1:6] if isinstance(item, fx.Node)]
        computed = [item.name for item in constants if item.op != "get_attr"]
        return f"{', '.join(computed)}: computed, not stored" if computed else None

    def rewrite(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> None:
        graph = graph_module.graph
        arguments: Any = match.args
        x, packed, scale, zero_point, shift, bias, x_scale, x_zero_point, shape, *geometry, dtype = arguments
        groups: Any = geometry[-1] if geometry else 1
        tensors = [_tensor(graph_module, item) for item in (packed, zero_point, shift)]
        weight = integer_weight(tensors[0], tensors[1], tensors[2], shape, groups)
        weight_scale, bias_value = _tensor(graph_module, scale), _tensor(graph_module, bias)
        kernel_dtype = dtype if dtype in OUTPUT_DTYPES else torch.float32
        if match.target is qdiff.conv2d.default:
            x_shape = [size_hint(size) for size in shape_of(x) or ()]
            stride, padding, dilation, _ = geometry
            prepacked = prepack_conv2d(weight, weight_scale, stride, padding, dilation, groups, x_shape)
            tail: tuple[Any, ...] = (shape, *geometry, kernel_dtype)
            target = qdiff.x86_conv2d.default
        else:
            prepacked = prepack_linear(weight)
            tail = (shape[0], kernel_dtype)
            target = qdiff.x86_linear.default
        with graph.inserting_before(match):
            prepacked_node = _constant(graph_module, f"x86_{match.name}_weight", prepacked)
            if bias_value is not None and bias_value.dtype != torch.float32:
                bias = _constant(graph_module, f"x86_{match.name}_bias", bias_value.to(torch.float32))
            node = graph.call_function(target, (x, prepacked_node, scale, bias, x_scale, x_zero_point, *tail))
            node.meta = dict(match.meta)
            result = node
            if kernel_dtype != dtype:
                node.meta["val"] = match.meta["val"].to(kernel_dtype)
                result = create_call(graph, aten.to.dtype, (node, dtype), like=match)
        match.replace_all_uses_with(result)
        graph.erase_node(match)


def _tensor(graph_module: fx.GraphModule, node: Any) -> Any:
    return None if node is None else get_tensor(graph_module, node.target).detach()


def _constant(graph_module: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    """A get_attr node of a new non-persistent buffer; packed weights have no fake form, so none gets one."""
    set_tensor(graph_module, name, tensor, persistent=False)
    return graph_module.graph.get_attr(name)
