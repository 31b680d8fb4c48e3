"""What a row of a forward pass takes in memory, from the shapes that the graph's nodes carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qdiff_fx.graph.meta import ATTENTION

ACTIVATION_BYTES = 4 * 2**30
"""What one forward pass of calibration may take beside the weights; a single row may take more."""

_ROUNDING_COPIES = 3
_SCORE_COPIES = 4
_SCORE_BYTES = 4
"""Fake-quantize works in float32 and holds a few copies of its operand; so does softmax, of its scores."""


@dataclass(frozen=True, kw_only=True)
class RowMemory:
    """Bytes for one batch row.

    Args:
      forward: the most that is alive at once without gradients, quantizers' temporaries included.
      saved: all that a backward pass finds saved.
      largest: the largest single activation.
    """

    forward: int
    saved: int
    largest: int


def row_memory(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> RowMemory:
    """Memory of a row of the size of `inputs`, the graph's flat inputs with any batch."""
    sizes = _Sizes(graph_module, inputs)
    last_use: dict[fx.Node, fx.Node] = {}
    owner: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        owner[node] = owner[source] if source is not None and _is_view(node) else node
        for item in node.all_input_nodes:
            last_use[owner[item]] = node
    ending: dict[fx.Node, list[fx.Node]] = {}
    for node, last in last_use.items():
        ending.setdefault(last, []).append(node)
    alive = peak = saved = largest = 0
    for node in graph_module.graph.nodes:
        own = sizes.bytes(node) if owner[node] is node and node.op != "get_attr" else 0
        alive += own
        saved += own
        largest = max(largest, own)
        peak = max(peak, alive + _temporary(node, sizes))
        alive -= sum(sizes.bytes(item) for item in ending.get(node, ()) if item.op != "get_attr")
    rows = max(1, len(inputs[0])) if inputs and inputs[0].dim() else 1
    return RowMemory(forward=-(-peak // rows), saved=-(-saved // rows), largest=-(-largest // rows))


def rows_within(row_bytes: int, wanted: int, budget: int = ACTIVATION_BYTES) -> int:
    """How many rows, of `wanted`, one pass takes within `budget` bytes; at least one."""
    return max(1, min(wanted, budget // max(1, row_bytes)))


def _temporary(node: fx.Node, sizes: _Sizes) -> int:
    """Bytes that a quantizer holds while it works."""
    if node.op != "call_module":
        return 0
    if ATTENTION.get(node) is None:
        return _ROUNDING_COPIES * sizes.bytes(node)
    query, key = (sizes.shape(item) for item in node.all_input_nodes[:2])
    scores = 1
    for size in (*query[:-1], key[-2]):
        scores *= size
    return _SCORE_COPIES * _SCORE_BYTES * scores


def _is_view(node: fx.Node) -> bool:
    """Whether the result shares its first operand's memory."""
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None:
        return node.op == "call_function"  # getitem, arithmetic on sizes
    return bool(schema.returns) and schema.returns[0].alias_info is not None


class _Sizes:
    """Shapes of nodes for the given inputs; symbolic sizes are looked up once an expression."""

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        self._known: dict[str, int] = {}
        self._symbols: dict[Any, int] = {}
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        for node, value in zip(placeholders, inputs, strict=True):
            for size, actual in zip(node.meta["val"].shape, value.shape, strict=True):
                if not isinstance(size, int) and size.node.expr.is_Symbol:
                    self._symbols[size.node.expr] = int(actual)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        value = node.meta.get("val")
        return tuple(self._size(size) for size in value.shape) if isinstance(value, Tensor) else ()

    def bytes(self, node: fx.Node) -> int:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return 0
        count = value.element_size()
        for size in self.shape(node):
            count *= size
        return count

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        key = str(expression)
        if key not in self._known:
            seen: Mapping[Any, int] = self._symbols
            result = expression.subs(seen)
            self._known[key] = int(result) if result.is_number else int(size.node.hint)
        return self._known[key]
