"""Run a graph and stop at the first layer that makes NaN or infinity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.errors import NonFiniteError
from qdiff_fx.graph.meta import ATTENTION, LAYER


class FiniteRun(fx.Interpreter):
    """Runs a graph node by node; layers, attentions and the graph's outputs must be finite.

    Every result is looked at, since integer codes swallow what they cannot hold: infinity saturates, NaN becomes some
    code. Waits for the device after each layer.

    Raises: NonFiniteError naming the first layer at fault.
    """

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        layer, attention = LAYER.get(n), ATTENTION.get(n)
        if (layer or attention or n.op == "output") and not _is_finite(result):
            name = layer.name if layer else attention.name if attention else "the output"
            raise NonFiniteError(
                f"{name} (node {n.name}) is the first to make NaN or infinity; check the inputs of the call, "
                f"or convert with dtype=torch.bfloat16 or torch.float32"
            )
        return result


def _is_finite(result: Any) -> bool:
    if isinstance(result, (list, tuple)):
        return all(_is_finite(item) for item in result)
    return not isinstance(result, Tensor) or not result.is_floating_point() or bool(torch.isfinite(result).all())
