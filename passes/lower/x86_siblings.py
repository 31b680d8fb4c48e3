"""Linears that read the same codes run as one: a small linear costs its call, whatever it multiplies."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from qdiff_fx.graph.meta import KERNEL
from qdiff_fx.kernels.x86 import kernel_dtype, linear_call
from qdiff_fx.passes.base import GraphPass, PassContext, PassResult, finish
from qdiff_fx.passes.lower.integer_layers import IntegerLayer, replace_by_slices, sibling_linears, stored_tensor
from qdiff_fx.passes.lower.x86_layers import insert_kernel_call


class MergeLinears(GraphPass):
    """Linears that read the same codes become one call and a slice each: the same sums, fewer calls.

    That is q, k and v of a self-attention, k and v of all cross-attentions, the time projections of all blocks. Rows of
    a weight have scales of their own, so nothing is rounded otherwise.

    Left alone: convolutions; linears whose constants are computed; everything where every layer's own result is wanted
    (`context.separate`).
    """

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        rewrites: list[str] = []
        for group in [] if context.separate else sibling_linears(graph_module):
            if len(group) > 1:
                _merge(group, graph_module)
                rewrites += [layer.node.name for layer in group]
        if rewrites:
            finish(graph_module)
        return PassResult(name=self.name, modified=bool(rewrites), rewrites=tuple(rewrites))


def merged_operands(
    group: Iterable[IntegerLayer], graph_module: fx.GraphModule
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight [sum of O, C] int8, its scale and its bias (float32) of linears as one."""
    weights, scales, biases = [], [], []
    for layer in group:
        weights.append(layer.integers(graph_module))
        scale, bias = (stored_tensor(graph_module, item) for item in (layer.weight_scale, layer.bias))
        assert scale is not None
        scales.append(scale)
        biases.append(torch.zeros_like(scale) if bias is None else bias.to(torch.float32))
    has_bias = any(layer.bias is not None for layer in group)
    return torch.cat(weights), torch.cat(scales), torch.cat(biases) if has_bias else None


def _merge(group: list[IntegerLayer], graph_module: fx.GraphModule) -> None:
    graph, first = graph_module.graph, group[0]
    weight, scale, bias = merged_operands(group, graph_module)
    dtype = kernel_dtype(first.output_dtype)
    call = linear_call(weight, scale, bias, first.x_scale, first.x_zero_point, dtype)
    with graph.inserting_before(first.node):
        node = insert_kernel_call(graph_module, f"x86_{first.node.name}_merged", first.x, call)
        value = first.node.meta["val"]
        node.meta["val"] = value.new_empty((*value.shape[:-1], len(weight)), dtype=dtype)
        for part in replace_by_slices(group, node):
            KERNEL.set(part, f"{str(call.target).removesuffix('.default')}, one of {len(group)} merged")
