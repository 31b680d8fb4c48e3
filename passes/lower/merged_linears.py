"""Linears that read the same codes as one of all their outputs, weights as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, fx

from qdiff_fx.graph.meta import MERGED
from qdiff_fx.passes.base import GraphPass, PassContext, PassResult, finish
from qdiff_fx.passes.lower.integer_layers import (
    IntegerLayer,
    add_constant,
    replace_by_slices,
    sibling_linears,
    stored_tensor,
    value_like,
)

qdiff = torch.ops.qdiff

_CONSTANTS = ("weight", "weight_scale", "weight_zero_point", "channel_shift", "bias")


class MergeStoredLinears(GraphPass):
    """Linears that read the same codes become one qdiff.linear and a slice each: one launch, which fills more of a GPU.

    That is q, k and v of a self-attention, k and v of all cross-attentions, the time projections of all blocks. Every
    output channel keeps its scale and its zero point, so nothing is rounded otherwise.

    Left alone: convolutions; linears whose constants are computed; 4-bit ones beside 8-bit ones, with other channel
    shifts or an odd number of weights; everything where every layer's own result is wanted (`context.separate`).
    """

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        rewrites: list[str] = []
        for readers in [] if context.separate else sibling_linears(graph_module):
            for group in alike(readers, graph_module):
                if len(group) > 1:
                    _merge(group, graph_module)
                    rewrites += [layer.node.name for layer in group]
        if rewrites:
            finish(graph_module)
        return PassResult(name=self.name, modified=bool(rewrites), rewrites=tuple(rewrites))


def alike(layers: Sequence[IntegerLayer], graph_module: fx.GraphModule) -> list[list[IntegerLayer]]:
    """Layers whose stored tensors can stand below each other."""
    groups: list[list[IntegerLayer]] = []
    apart: list[list[IntegerLayer]] = []
    for layer in layers:
        if layer.weight_zero_point is not None and prod(layer.weight_shape) % 2:
            apart.append([layer])  # the codes of the next one would start within a byte
            continue
        for group in groups:
            if _stored_alike(layer, group[0], graph_module):
                group.append(layer)
                break
        else:
            groups.append([layer])
    return groups + apart


def _stored_alike(left: IntegerLayer, right: IntegerLayer, graph_module: fx.GraphModule) -> bool:
    """Whether both are packed, or both not, with the same channel shifts; abstract ones are the same by name only."""
    if (left.weight_zero_point is None) != (right.weight_zero_point is None):
        return False
    shifts = [stored_tensor(graph_module, layer.channel_shift) for layer in (left, right)]
    if shifts[0] is None or shifts[1] is None:
        return shifts[0] is shifts[1]
    if shifts[0].is_meta:
        return left.channel_shift is right.channel_shift
    return torch.equal(shifts[0], shifts[1])


def _merge(group: Sequence[IntegerLayer], graph_module: fx.GraphModule) -> None:
    graph, first = graph_module.graph, group[0]
    tensors = _stacked(group, graph_module)
    shape = [sum(layer.weight_shape[0] for layer in group), first.weight_shape[1]]
    value = first.node.meta["val"]
    with graph.inserting_before(first.node):
        constants = []
        for name in _CONSTANTS:
            tensor = tensors[name]
            constant = (
                None if tensor is None else add_constant(graph_module, f"{first.node.name}_merged_{name}", tensor)
            )
            if constant is not None and tensor is not None:
                constant.meta["val"] = value_like(first.node, tensor)
            constants.append(constant)
        operands = (first.x, *constants, first.x_scale, first.x_zero_point, shape, first.output_dtype)
        merged = graph.call_function(qdiff.linear.default, operands)
        merged.meta["val"] = value.new_empty((*value.shape[:-1], shape[0]))
        for part in replace_by_slices(group, merged):
            MERGED.set(part, len(group))


def _stacked(group: Sequence[IntegerLayer], graph_module: fx.GraphModule) -> dict[str, Tensor | None]:
    """The stored tensors of all layers below each other; the shifts, which they share; biases only if one has any."""
    stacked: dict[str, Tensor | None] = {"channel_shift": stored_tensor(graph_module, group[0].channel_shift)}
    for name in ("weight", "weight_scale", "weight_zero_point", "bias"):
        parts = [stored_tensor(graph_module, getattr(layer, name)) for layer in group]
        first = next((item for item in parts if item is not None), None)
        if first is None:
            stacked[name] = None
            continue
        # Only a bias may be missing in some.
        lengths = [layer.weight_shape[0] for layer in group]
        stacked[name] = torch.cat(
            [first.new_zeros(length) if item is None else item for item, length in zip(parts, lengths, strict=True)]
        )
    return stacked
