"""Shortcut-splitting quantization (Q-Diffusion, section 4.2) as an exact rewrite of the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qdiff_fx.graph.edit import RANGE_KEEPING, LayerCall, create_call, get_tensor, layer_call, set_tensor, shape_of
from qdiff_fx.graph.meta import MODULE_PATH, SPLIT_ADD, SPLIT_PART, SplitPart
from qdiff_fx.passes.analysis import depends_on_sample, reads_sample
from qdiff_fx.passes.base import PassContext, RewritePass

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class ShortcutMatch:
    """A layer that a channel cat reaches through `chain` (in execution order, cat excluded)."""

    layer: LayerCall
    cat: fx.Node
    chain: tuple[fx.Node, ...]
    channel_axis: int
    """Of the cat's output at the layer, counted from the front."""
    operands: tuple[fx.Node, ...]


class SplitShortcuts(RewritePass[ShortcutMatch]):
    """layer(cat(x_1, ..., x_n), W) becomes layer(x_1, W_1) + ... + layer(x_n, W_n).

    From there on every part is an ordinary layer with quantizers of its own. The bias goes to the first part; the
    joining adds are tagged SPLIT_ADD. Exact up to the rounding of floating-point sums.

    Left alone: a cat behind a normalisation (its output has one range), on another dimension than the layer's
    channels, grouped convolutions, layers that read the noisy sample (they stay in the carrier type), layers that
    do not depend on the sample (embeddings), weights computed in the graph, and everything when
    `config.split_shortcuts` is off.
    """

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> ShortcutMatch | None:
        layer = layer_call(node)
        if layer is None or not context.config.split_shortcuts:
            return None
        chain: list[fx.Node] = []
        source = layer.input
        while source.op == "call_function" and source.target is not aten.cat.default:
            if source.target not in (*RANGE_KEEPING, *_MOVING):
                return None
            chain.insert(0, source)
            parent = source.args[0]
            assert isinstance(parent, fx.Node)
            source = parent
        shape = shape_of(source)
        if source.target is not aten.cat.default or shape is None:
            return None
        operands: Any = source.args[0]
        axis = _cat_axis(source) % len(shape)
        for step in chain:
            moved = _moved_axis(step, axis)
            if moved is None:
                return None
            axis = moved
        return ShortcutMatch(layer=layer, cat=source, chain=tuple(chain), channel_axis=axis, operands=tuple(operands))

    def check(self, match: ShortcutMatch, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        layer, shape = match.layer, shape_of(match.layer.input)
        assert shape is not None
        wanted = layer.channel_axis % len(shape)
        if match.channel_axis != wanted:
            return f"the cat joins dimension {match.channel_axis}, the layer's channels are dimension {wanted}"
        if layer.groups != 1:
            return f"groups={layer.groups}: a part's channels would cross groups"
        if layer.weight.op != "get_attr":
            return "its weight is computed in the graph"
        sizes = [(shape_of(operand) or ())[_cat_axis(match.cat)] for operand in match.operands]
        if not all(isinstance(size, int) for size in sizes):
            return f"operand channels {sizes} are not static"
        if not depends_on_sample(match.layer.node, context.signature):
            return "it does not depend on the sample: an embedding, no shortcut"
        if not context.config.quantize_boundaries and reads_sample(layer.input, context.signature):
            return "it reads the noisy sample, which stays in the carrier type"
        return None

    def rewrite(self, match: ShortcutMatch, graph_module: fx.GraphModule, context: PassContext) -> None:
        graph, layer = graph_module.graph, match.layer
        weight = get_tensor(graph_module, layer.weight.target)
        total: fx.Node | None = None
        parts: list[fx.Node] = []
        start = 0
        with graph.inserting_before(layer.node):
            for index, operand in enumerate(match.operands):
                stop = start + int((shape_of(operand) or ())[_cat_axis(match.cat)])
                part_weight = _weight_part(graph_module, layer, weight, index, start, stop)
                source, axis = operand, _cat_axis(match.cat) % len(shape_of(match.cat) or ())
                for step in match.chain:
                    source, axis = _on_part(graph, step, source, axis, stop - start)
                args = (source, part_weight, layer.bias if index == 0 else None, *layer.node.args[3:])
                part = create_call(graph, _target(layer.node), args, layer.node.kwargs, like=layer.node)
                SPLIT_PART.set(part, SplitPart(cat=match.cat.name, index=index, start=start, stop=stop))
                parts.append(part)
                if total is not None:
                    part = create_call(graph, aten.add.Tensor, (total, part), like=layer.node)
                    SPLIT_ADD.set(part, True)
                total, start = part, stop
        assert total is not None
        layer.node.replace_all_uses_with(total)
        graph.erase_node(layer.node)
        for part in parts:  # an operand may be a cat itself
            nested = self.pattern(part, graph_module, context)
            if nested is not None and self.check(nested, graph_module, context) is None:
                self.rewrite(nested, graph_module, context)


_RESHAPING = (aten.view.default, aten.reshape.default)

_MOVING = (aten.permute.default, aten.transpose.int, aten.flatten.using_ints, *_RESHAPING)
"""Range-keeping operators that may move the channel axis."""


def _target(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


def _cat_axis(cat: fx.Node) -> int:
    axis = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    assert isinstance(axis, int)
    return axis


def _moved_axis(node: fx.Node, axis: int) -> int | None:
    """Where `axis` of the node's input lies in its output; None if it does not survive."""
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    if before is None or after is None:
        return None
    args: Any = node.args
    if node.target is aten.permute.default:
        return [dim % len(before) for dim in args[1]].index(axis)
    if node.target is aten.transpose.int:
        first, second = args[1] % len(before), args[2] % len(before)
        moved: int = {first: second, second: first}.get(axis, axis)
        return moved
    if node.target in (*_RESHAPING, aten.flatten.using_ints):
        if axis == len(before) - 1 and _equal(before[-1:], after[-1:]):
            return len(after) - 1
        # Nothing up to the channels changed: only what lies behind them was folded.
        return axis if _equal(before[: axis + 1], after[: axis + 1]) else None
    return axis


def _equal(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """Whether two shapes are the same; compared by name, which adds no guard to a dynamic size."""
    return [str(size) for size in left] == [str(size) for size in right]


def _on_part(graph: fx.Graph, step: fx.Node, source: fx.Node, axis: int, channels: int) -> tuple[fx.Node, int]:
    """The chain operator `step` on one part, and where the part's channels lie in the result."""
    moved = _moved_axis(step, axis)
    assert moved is not None
    args: Any = step.args
    if step.target in _RESHAPING:
        sizes = [channels if index == moved else size for index, size in enumerate(args[1])]
        # A reshape even for a view: a cat is contiguous, its operands may be strided.
        return create_call(graph, aten.reshape.default, (source, sizes), like=step), moved
    return create_call(graph, _target(step), (source, *args[1:]), step.kwargs, like=step), moved


def _weight_part(
    graph_module: fx.GraphModule, layer: LayerCall, weight: torch.Tensor, index: int, start: int, stop: int
) -> fx.Node:
    """A view of the weight's input channels [start, stop): the original storage is shared."""
    target = f"{layer.weight.target}_part{index}"
    view = weight.detach()[:, start:stop]
    set_tensor(graph_module, target, nn.Parameter(view, requires_grad=weight.requires_grad))
    node = graph_module.graph.get_attr(target)
    MODULE_PATH.set(node, MODULE_PATH.get(layer.weight) or "")
    node.meta["val"] = layer.weight.meta["val"][:, start:stop]
    return node
