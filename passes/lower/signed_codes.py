"""Codes less 128, as int8: what tensor cores read. The plan's codes are unsigned."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qdiff_fx.graph.edit import create_call
from qdiff_fx.passes.base import PassContext, RewritePass

aten = torch.ops.aten

_SIGN = 128
"""Flipping the sign bit of a byte takes 128 from an unsigned code, and adds it to a signed one."""


def signed_codes(graph: fx.Graph, codes: fx.Node) -> fx.Node:
    """The int8 codes of uint8 ones, at the graph's insertion point; made once for all readers that follow."""
    if codes.target is aten.unsqueeze.default:  # a conv1d, run as conv2d: the step before may have other readers
        source: Any = codes.args[0]
        return create_call(graph, aten.unsqueeze.default, (signed_codes(graph, source), *codes.args[1:]), like=codes)
    for flipped in codes.users:
        if flipped.target is aten.bitwise_xor.Scalar and flipped.args[1] == _SIGN:
            for view in flipped.users:
                if view.target is aten.view.dtype:
                    return view
    with graph.inserting_after(codes):
        flipped = create_call(graph, aten.bitwise_xor.Scalar, (codes, _SIGN), like=codes)
    with graph.inserting_after(flipped):
        return create_call(graph, aten.view.dtype, (flipped, torch.int8), like=codes)


def unsigned_codes(graph: fx.Graph, codes: fx.Node) -> fx.Node:
    """The uint8 codes of int8 ones, at the graph's insertion point."""
    view = create_call(graph, aten.view.dtype, (codes, torch.uint8), like=codes)
    return create_call(graph, aten.bitwise_xor.Scalar, (view, _SIGN), like=codes)


class CancelSignChanges(RewritePass[fx.Node]):
    """int8 codes that were made unsigned and signed again are themselves.

    Left alone: unsigned codes that anything else reads; they stay beside the signed ones.
    """

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> fx.Node | None:
        chain = node
        for target in (aten.view.dtype, aten.bitwise_xor.Scalar, aten.bitwise_xor.Scalar, aten.view.dtype):
            if chain.target is not target or not isinstance(chain.args[0], fx.Node):
                return None
            chain = chain.args[0]
        return node

    def rewrite(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> None:
        source: Any = match
        for _ in range(4):
            source = source.args[0]
        match.replace_all_uses_with(source)
        graph_module.graph.erase_node(match)
