"""Remove what does nothing at inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qdiff_fx.passes.base import PassContext, RewritePass

aten = torch.ops.aten

_END = 2**63 - 1


class RemoveTrainingOps(RewritePass[fx.Node]):
    """Drop dropout in eval, metadata assertions, whole slices, and multiplications and divisions by 1.

    Left alone: dropout that is on (a captured training-mode module is refused before), casts (they carry the
    dtype token), `contiguous` (it sets strides that later views rely on).
    """

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> fx.Node | None:
        return node if node.op == "call_function" and _does_nothing(node) else None

    def rewrite(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> None:
        if match.users:
            source = match.args[0]
            assert isinstance(source, fx.Node)
            match.replace_all_uses_with(source)
        graph_module.graph.erase_node(match)


def _does_nothing(node: fx.Node) -> bool:
    target, args = node.target, node.args
    if target is aten._assert_tensor_metadata.default:
        return True
    if target is aten.dropout.default:
        return bool(not args[2] or args[1] == 0.0)
    if target in (aten.alias.default, aten.detach.default, aten.detach_.default):
        return True
    if target is aten.slice.Tensor:
        return _argument(node, 2, "start", None) in (None, 0) and (
            _argument(node, 3, "end", None) in (None, _END) and _argument(node, 4, "step", 1) == 1
        )
    # An integer tensor divided by 1 becomes floating, so only floating inputs pass unchanged.
    if target in (aten.mul.Tensor, aten.div.Tensor):
        return _is_one(args[1]) and isinstance(args[0], fx.Node) and _is_floating(args[0]) and not node.kwargs
    return False


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _is_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 1


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
