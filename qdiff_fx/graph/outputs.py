"""How a graph's flat outputs map back to what the module returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qdiff_fx.errors import CaptureError


@dataclass(frozen=True, kw_only=True)
class OutputStructure:
    """Nesting of a module's result; leaves are indices into the flat outputs, or constants."""

    structure: Mapping[str, Any]

    def unflatten(self, outputs: Sequence[Tensor]) -> Any:
        """The result in the module's own nesting."""
        return _build(self.structure, outputs)


def flatten_output(result: Any) -> tuple[OutputStructure, tuple[Tensor, ...]]:
    """The nesting of a module's result and its tensors."""
    tensors: list[Tensor] = []

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return {"output": len(tensors) - 1}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"constant": value}
        if isinstance(value, Mapping):
            return {"dict": {key: visit(item) for key, item in value.items()}}
        if isinstance(value, (list, tuple)):
            return {"list" if isinstance(value, list) else "tuple": [visit(item) for item in value]}
        raise CaptureError(
            f"the module returns a {type(value).__name__}; want tensors, or lists, tuples and dicts of them"
        )

    structure = visit(result)
    if not tensors:
        raise CaptureError("the module returns no tensor")
    return OutputStructure(structure=structure), tuple(tensors)


def _build(node: Any, outputs: Sequence[Tensor]) -> Any:
    ((kind, content),) = node.items()
    if kind == "output":
        return outputs[content]
    if kind == "constant":
        return content
    if kind == "dict":
        return {key: _build(item, outputs) for key, item in content.items()}
    items = [_build(item, outputs) for item in content]
    return items if kind == "list" else tuple(items)
