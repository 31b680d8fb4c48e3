"""A network as a graph of its blocks: what flows where, at which resolution."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from qdiff_fx.graph.meta import BLOCK
from qdiff_fx.graph.propagate import size_hint
from qdiff_fx.passes.analysis import blocks

_MAP = 4
"""Dimensions of a tensor that has a height and a width."""


def block_graph(graph_module: fx.GraphModule) -> dict[str, Any]:
    """The reconstruction blocks of a prepared or a converted graph, as plain data.

    Returns "blocks": index, name, layers and level (halvings of the resolution; that of what feeds it for a block
    without feature maps), in execution order, and "edges": [from, to], by index. What all samples share (a time
    embedding: one vector a sample) is no edge.
    """
    sources: dict[fx.Node, dict[int, None]] = {}
    edges: dict[tuple[int, int], None] = {}
    widths: dict[int, int | None] = {}
    widest = 1
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) and node.op != "call_module":
            sources[node] = {}
            continue
        block = BLOCK.get(node)
        incoming = {source: None for item in node.all_input_nodes if _flows(item) for source in sources.get(item, ())}
        if block is not None:
            edges.update({(source, block): None for source in incoming if source != block})
        sources[node] = incoming if block is None else {block: None}
        if isinstance(value, Tensor):
            width = size_hint(value.shape[-1]) if value.dim() == _MAP else None
            widest = max(widest, width or 1) if node.op == "placeholder" else widest
            if block is not None:
                widths[block] = width  # at last, that of what the block gives out
    levels: dict[int, int] = {}
    named = tuple(blocks(graph_module))
    for item in named:
        feeding = [levels[source] for source, target in edges if target == item.index and source in levels]
        width = widths.get(item.index)
        measured = None if width is None else max(0, round(math.log2(widest / max(1, width))))
        levels[item.index] = measured if measured is not None else max(feeding, default=0)
    return {
        "blocks": [
            {"index": item.index, "name": item.name, "layers": list(item.layers), "level": levels[item.index]}
            for item in named
        ],
        "edges": sorted([source, target] for source, target in edges if source in levels and target in levels),
    }


def _flows(node: fx.Node) -> bool:
    """Whether the result has more than one vector a sample; modules (quantizers) hand on what they read."""
    value: Any = node.meta.get("val")
    if isinstance(value, Tensor):
        return value.dim() > 2
    return node.op == "call_module" and any(_flows(item) for item in node.all_input_nodes[:1])
