"""Let views survive a change of memory format."""

from __future__ import annotations

import torch
from torch import fx

from qdiff_fx.passes.base import PassContext, RewritePass

aten = torch.ops.aten


class ViewsToReshapes(RewritePass[fx.Node]):
    """aten.view becomes aten.reshape: integer convolutions return channels_last, which some views cannot express.

    Left alone: nothing; where the strides allow it a reshape is a view.
    """

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> fx.Node | None:
        return node if node.target is aten.view.default else None

    def rewrite(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> None:
        match.target = aten.reshape.default
