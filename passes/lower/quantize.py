"""Quantize steps as plain ATen, which inductor fuses into whatever makes their input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from qdiff_fx.graph.edit import copy_provenance, shape_of
from qdiff_fx.kernels.cuda_weights import SIGNED_OFFSET
from qdiff_fx.kernels.reference import quantize_activation
from qdiff_fx.passes.base import PassContext, RewritePass
from qdiff_fx.passes.lower.signed_codes import unsigned_codes

aten = torch.ops.aten
qdiff = torch.ops.qdiff


class LowerQuantize(RewritePass[fx.Node]):
    """qdiff.quantize becomes the ATen calls of `reference.quantize_activation`, images channels_last.

    The calls are traced from the reference, so that its arithmetic is not written down a second time. The layout,
    contiguous where it is no image (there channels are last as it is), is what integer layers read; compiled, it is
    only the order in which the fused kernel writes.

    Left alone: nothing.

    Args:
      signed: make int8 codes, 128 less, and the plan's uint8 codes from them for whoever reads those.
    """

    def __init__(self, *, signed: bool = False) -> None:
        self.signed = signed

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> fx.Node | None:
        return node if node.target is qdiff.quantize.default else None

    def rewrite(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> None:
        x, inv_scale, *constants = match.args
        assert isinstance(x, fx.Node) and isinstance(inv_scale, fx.Node)
        traced = _trace(x, inv_scale, constants, self.signed)
        placeholders = iter((x, inv_scale))
        graph = graph_module.graph
        values: dict[fx.Node, Any] = {}
        with graph.inserting_before(match):
            for node in traced.nodes:
                if node.op == "placeholder":
                    values[node] = next(placeholders)
                elif node.op == "call_function":
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: values[item])
                    values[node] = graph.call_function(node.target, args, kwargs)
                else:
                    result: fx.Node = values[node.args[0]]
            image = len(shape_of(match) or ()) == 4 and constants[-1] == 1
            layout: dict[str, Any] = {"memory_format": torch.channels_last if image else torch.contiguous_format}
            result = graph.call_function(aten.contiguous.default, (result,), layout)
        # Fake values of the steps between would take seconds for a large network, and nothing reads them.
        for node in values.values():
            if node not in (x, inv_scale):
                copy_provenance(match, node)
        result.meta = dict(match.meta)
        if self.signed:
            result.meta["val"] = match.meta["val"].view(torch.int8)
            with graph.inserting_before(match):
                result = unsigned_codes(graph, result)
        match.replace_all_uses_with(result)
        graph.erase_node(match)


def _trace(x: fx.Node, inv_scale: fx.Node, constants: list[Any], signed: bool) -> fx.Graph:
    """The reference's ATen calls for operands of these ranks and dtypes; they depend on nothing else."""
    # The same codes: whole numbers below 2^24 lose nothing, and larger ones saturate on either grid.
    zero_point, qmin, qmax = (item - SIGNED_OFFSET * signed for item in constants[:3])
    axis, dtype = constants[-1], torch.int8 if signed else torch.uint8
    operands = [_example(x, inv_scale, axis), torch.ones(shape_of(inv_scale) or ())]
    traced = make_fx(lambda x, inv_scale: quantize_activation(x, inv_scale, zero_point, qmin, qmax, axis, dtype))(
        *operands
    )
    graph: fx.Graph = traced.graph
    return graph


def _example(x: fx.Node, inv_scale: fx.Node, channel_axis: int) -> Tensor:
    shape = [2] * len(shape_of(x) or ())
    if channels := shape_of(inv_scale):
        shape[channel_axis] = channels[0]
    return torch.zeros(shape, dtype=x.meta["val"].dtype)
