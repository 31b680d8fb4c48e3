"""Which node of a graph first makes NaN or infinity of finite values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.graph.meta import ATTENTION, LAYER, MODULE_PATH


def is_finite(result: Any) -> bool:
    """Whether every floating tensor in a nest of tuples and lists is finite; waits for the device."""
    if isinstance(result, (list, tuple)):
        return all(is_finite(item) for item in result)
    return not isinstance(result, Tensor) or not result.is_floating_point() or bool(torch.isfinite(result).all())


def first_non_finite(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> str | None:
    """The first node whose result is not finite, by its layer's name where it has one; None if all are.

    A masked score of minus infinity counts too, so ask only where the graph's outputs are not finite.
    """
    finder = _Finder(graph_module)
    with torch.no_grad():
        finder.run(*inputs)
    return finder.found


class _Finder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.found: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self.found is None and n.op != "output" and not is_finite(result):
            layer, attention = LAYER.get(n), ATTENTION.get(n)
            name = layer.name if layer else attention.name if attention else MODULE_PATH.get(n)
            self.found = f"{name} ({n.name})" if name else n.name
        return result
