"""Integer layers on x86's kernels, weights packed."""

from __future__ import annotations

import torch
from torch import fx

from qdiff_fx.graph.edit import shape_of
from qdiff_fx.graph.propagate import size_hint
from qdiff_fx.kernels.x86 import KernelCall, conv2d_call, kernel_dtype, linear_call
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.lower.integer_layers import (
    IntegerLayer,
    IntegerLayerPass,
    add_constant,
    replace_call,
    stored_tensor,
)


class LowerX86Layers(IntegerLayerPass):
    """qdiff.conv2d and qdiff.linear become operators of kernels/x86.py.

    4-bit weights are unpacked and their zero points and shifts folded into int8; every weight is packed into a
    non-persistent buffer. A bias is kept in float32, which is what the kernels add. Carrier types that they do not
    write are cast from float32.

    Left alone: layers whose weights are computed in the graph.
    """

    def rewrite(self, match: IntegerLayer, graph_module: fx.GraphModule, context: PassContext) -> None:
        layer = match.node
        weight = match.integers(graph_module)
        weight_scale, bias = (stored_tensor(graph_module, item) for item in (match.weight_scale, match.bias))
        assert weight_scale is not None
        bias = None if bias is None else bias.to(torch.float32)
        dtype = kernel_dtype(match.output_dtype)
        if match.is_conv2d:
            x_shape = [size_hint(size) for size in shape_of(match.x) or ()]
            step = (match.x_scale, match.x_zero_point)
            call = conv2d_call(weight, weight_scale, bias, *step, match.geometry, x_shape, dtype)
        else:
            call = linear_call(weight, weight_scale, bias, match.x_scale, match.x_zero_point, dtype)
        with graph_module.graph.inserting_before(layer):
            node = insert_kernel_call(graph_module, f"x86_{layer.name}", match.x, call)
        node.meta["val"] = layer.meta["val"].to(dtype)
        replace_call(layer, node)


def insert_kernel_call(graph_module: fx.GraphModule, name: str, x: fx.Node, call: KernelCall) -> fx.Node:
    """`call` of `x` at the graph's insertion point, its tensors in buffers called `name`_ROLE; without metadata.

    Buffers have no fake values: weights packed by oneDNN have no fake form.
    """
    constants = [
        None if tensor is None else add_constant(graph_module, f"{name}_{role}", tensor)
        for role, tensor in call.tensors.items()
    ]
    return graph_module.graph.call_function(call.target, (x, *constants, *call.literals))
