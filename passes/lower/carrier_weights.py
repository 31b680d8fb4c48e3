"""Weights of layers whose input stays in the carrier type, dequantized once."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qdiff_fx.graph.edit import get_tensor, set_tensor
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.lower.stored_weights import StoredWeightPass

qdiff = torch.ops.qdiff


class DequantizeWeights(StoredWeightPass):
    """qdiff.dequantize_weight becomes a constant of the carrier type (docs/decisions/010-x86-kernels.md says why).

    Kernels of convolutions are stored channels_last, as compiled code would otherwise copy them on every call.

    Left alone: weights that are computed in the graph.
    """

    def rewrite(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> None:
        args = fx.map_arg(match.args, lambda item: get_tensor(graph_module, item.target))
        weight = qdiff.dequantize_weight.default(*args)
        name = f"carrier_{match.name}"
        set_tensor(graph_module, name, channels_last(weight), persistent=False)
        with graph_module.graph.inserting_before(match):
            constant = graph_module.graph.get_attr(name)
        constant.meta = dict(match.meta)
        match.replace_all_uses_with(constant)
        graph_module.graph.erase_node(match)


def channels_last(weight: Tensor) -> Tensor:
    """A kernel [O, C, kH, kW] channels_last, other weights as they are.

    With one input channel both layouts are the same bytes, and only the strides tell a convolution to write its output
    channels_last: `contiguous` would leave them.
    """
    if weight.ndim != 4:
        return weight
    if weight.shape[1] == 1:
        return torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight)
    return weight.contiguous(memory_format=torch.channels_last)
