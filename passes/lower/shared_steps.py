"""Equal steps before integer layers, done once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.graph.edit import get_tensor
from qdiff_fx.passes.base import GraphPass, PassContext, PassResult, finish

aten = torch.ops.aten
qdiff = torch.ops.qdiff


class ShareQuantizeSteps(GraphPass):
    """Quantize steps of one tensor on one grid become one, so that their readers can be recognised as siblings.

    Every ResNet block of a diffusers UNet applies SiLU to the time embedding on its own; equal SiLUs become one too.

    Left alone: steps whose scales differ (learned ones, channel factors of their own).
    """

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        seen: dict[Any, fx.Node] = {}
        rewrites = []
        for node in list(graph_module.graph.nodes):
            if node.target is aten.silu.default:
                key: Any = (node.target, node.args[0])
            elif node.target is qdiff.quantize.default:
                scale = get_tensor(graph_module, node.args[1].target)
                key = (node.target, node.args[0], tuple(scale.shape), _values(scale), node.args[2:])
            else:
                continue
            first = seen.setdefault(key, node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph_module.graph.erase_node(node)
                rewrites.append(node.name)
        if rewrites:
            finish(graph_module)
        return PassResult(name=self.name, modified=bool(rewrites), rewrites=tuple(rewrites))


def _values(scale: Tensor) -> str:
    """What makes two scales equal: their values; of abstract tensors, which have none, themselves."""
    return str(id(scale)) if scale.is_meta else repr(scale.flatten().tolist())
