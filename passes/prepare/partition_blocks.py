"""Partition the graph into reconstruction blocks: residual blocks, then the remaining quantized layers one by one."""

from __future__ import annotations

import torch
from torch import fx

from qdiff_fx.graph.edit import ancestors, layer_call, shape_of
from qdiff_fx.graph.meta import BLOCK, LAYER, SPLIT_ADD
from qdiff_fx.passes.base import GraphPass, PassContext, PassResult

aten = torch.ops.aten

MAXIMUM_RESIDUALS = 4
"""A block spans at most so many residual adds: a transformer with one layer and its outer shortcut. Larger spans are
taken apart, so that a stage of ten transformer layers is not one block."""


class PartitionBlocks(GraphPass):
    """Write BLOCK on every node of every block; every quantized layer lies in exactly one.

    A residual add joins two tensors of one shape, one of which is computed from what the other is (or both from a
    common ancestor): the block is what only one side depends on, without nodes that something outside reads.
    Layers that only one side needs (time projections, k and v of the context) are inside by that rule. Purely
    structural: names of classes and attributes play no role.

    Left alone: adds that join split shortcuts, broadcast adds (time embedding), adds of an input (control residuals).
    """

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        graph = graph_module.graph
        nodes = list(graph.nodes)
        spans = _maximal(_residual_spans(graph, nodes))
        owner: dict[fx.Node, fx.Node] = {}
        for add, span in spans.items():
            for node in span:
                owner.setdefault(node, add)
        for node in nodes:
            if _is_quantized_layer(node):
                owner.setdefault(node, node)
        modified = _number(nodes, owner)
        return PassResult(
            name=self.name, modified=modified, rewrites=tuple(end.name for end in dict.fromkeys(owner.values()))
        )


def _residual_spans(graph: fx.Graph, nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For every residual add, its span in execution order, the add included."""
    masks = ancestors(graph)
    positions = {node: index for index, node in enumerate(nodes)}
    spans: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        sides = [item for item in node.args if isinstance(item, fx.Node)]
        if node.target is not aten.add.Tensor or len(sides) != 2 or SPLIT_ADD.get(node):
            continue
        shapes = [shape_of(side) for side in sides]
        if shapes[0] is None or shapes[1] is None or not _same_shape(shapes[0], shapes[1]):
            continue
        left, right = (masks[side] for side in sides)
        if not left & right or any(side.op == "placeholder" for side in sides):
            continue
        inside = _bits(left ^ right, nodes)
        span = _single_exit([*inside, node], node)
        if any(layer_call(item) for item in span):
            spans[node] = sorted(span, key=positions.__getitem__)
    return spans


def _single_exit(span: list[fx.Node], exit_node: fx.Node) -> list[fx.Node]:
    """`span` without the nodes that something outside it reads (the shared time embedding, skips of a U)."""
    kept = dict.fromkeys(node for node in span if node.op not in ("placeholder", "get_attr"))
    for node in reversed(span):  # users come later, so one backward sweep is the fixpoint
        if node in kept and node is not exit_node and any(user not in kept for user in node.users):
            del kept[node]
    return list(kept)


def _maximal(spans: dict[fx.Node, list[fx.Node]]) -> dict[fx.Node, list[fx.Node]]:
    """The spans that no other admissible span contains; spans over too many residual adds are taken apart."""
    admissible = {add: span for add, span in spans.items() if sum(node in spans for node in span) <= MAXIMUM_RESIDUALS}
    chosen: dict[fx.Node, list[fx.Node]] = {}
    taken: dict[fx.Node, None] = {}
    for add in reversed(list(admissible)):  # an outer add comes after the inner ones
        if add not in taken:
            chosen[add] = admissible[add]
            taken.update(dict.fromkeys(admissible[add]))
    return {add: span for add, span in spans.items() if add in chosen}


def _number(nodes: list[fx.Node], owner: dict[fx.Node, fx.Node]) -> bool:
    """Write block indices in execution order of the blocks' last nodes."""
    ends = [node for node in nodes if node in dict.fromkeys(owner.values())]
    index = {end: number for number, end in enumerate(ends)}
    modified = False
    for node in nodes:
        number = index[owner[node]] if node in owner else None
        modified |= BLOCK.get(node) != number
        if number is None:
            node.meta.pop(BLOCK.name, None)
        else:
            BLOCK.set(node, number)
    return modified


def _is_quantized_layer(node: fx.Node) -> bool:
    policy = LAYER.get(node)
    return policy is not None and policy.weight is not None


def _same_shape(left: tuple[object, ...], right: tuple[object, ...]) -> bool:
    return len(left) == len(right) and all(str(a) == str(b) for a, b in zip(left, right, strict=True))


def _bits(mask: int, nodes: list[fx.Node]) -> list[fx.Node]:
    return [node for index, node in enumerate(nodes) if mask >> index & 1]
