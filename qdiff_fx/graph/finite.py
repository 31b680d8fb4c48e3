"""Run a graph and stop at the first layer that makes NaN or infinity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.errors import NonFiniteError
from qdiff_fx.graph.meta import ATTENTION, LAYER
from qdiff_fx.graph.signature import tree_leaves


class FiniteRun(fx.Interpreter):
    """Runs a graph node by node; layers, attentions and the graph's outputs must be finite.

    Every result is looked at, since integer codes swallow what they cannot hold: infinity saturates, NaN becomes some
    code. Waits for the device after each layer.

    Raises: NonFiniteError naming the first layer at fault.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False  # errors are one line

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        layer, attention = LAYER.get(n), ATTENTION.get(n)
        if (layer or attention or n.op == "output") and not is_finite(result):
            name = layer.name if layer else attention.name if attention else "the output"
            raise NonFiniteError(
                f"{name} (node {n.name}) is the first to make NaN or infinity; check the inputs of the call; "
                f"if float16 overflows, take bfloat16 or float32: cast the model before prepare(), or convert(dtype=)"
            )
        return result


def is_finite(result: Any) -> bool:
    """Whether no floating tensor among `result` and what is nested in it holds NaN or infinity."""
    tensors = (item for item in tree_leaves(result) if isinstance(item, Tensor) and item.is_floating_point())
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
