"""Group normalisation in the form that compiles to whole vectors of channels."""

from __future__ import annotations

import torch
from torch import fx

from qdiff_fx.graph.edit import shape_of
from qdiff_fx.kernels.x86_norms import group_norm
from qdiff_fx.passes.base import PassContext, RewritePass

aten = torch.ops.aten


class NormalizeByChannel(RewritePass[fx.Node]):
    """aten.group_norm becomes `kernels.x86_norms.group_norm`.

    Left alone: inputs [B, C], which have no pixels.
    """

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> fx.Node | None:
        return node if node.target is aten.group_norm.default else None

    def check(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        x = match.args[0]
        assert isinstance(x, fx.Node)
        if (shape := shape_of(x)) is None:
            return "its input's shape is unknown"
        return None if len(shape) > 2 else "there are no pixels to reduce over"

    def rewrite(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> None:
        # The sixth argument, cudnn_enabled, chooses between CUDA kernels.
        match.target, match.args = group_norm, match.args[:5]
        match.kwargs = {name: value for name, value in match.kwargs.items() if name != "cudnn_enabled"}
