"""The structure of a module call, apart from its tensors: what turns stored rows into a call again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from qdiff_fx.errors import CheckpointError
from qdiff_fx.safe_io import json_bytes, json_field

ROW, WHOLE, NUMBER = "row", "whole", "number"

_DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LeafSpec:
    """One tensor or number of a call.

    Args:
      name: dotted path of the argument, e.g. "sample" or "added_cond_kwargs.text_embeds".
      kind: "row" (a tensor whose first dimension is the batch), "whole" (a tensor without batch dimension, which
        belongs to each row as it is), "number" (a python int or float, held as int64 or float64).
      dtype: e.g. "float32".
      shape: without the batch dimension.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return _DTYPES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class CallForm:
    """Everything about a call but the values of its leaves.

    Args:
      args, kwargs: nested JSON; a node is {"leaf": index}, {"value": None, bool or str}, {"list": [...]},
        {"tuple": [...]} or {"dict": [[key, node], ...]}.
      leaves: one spec for each leaf index.
      timestep: index of the leaf that holds the timestep; None if the call has none.
    """

    args: Mapping[str, Any]
    kwargs: Mapping[str, Any]
    leaves: tuple[LeafSpec, ...]
    timestep: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` restores an equal form."""
        leaves = [{"name": x.name, "kind": x.kind, "dtype": x.dtype, "shape": list(x.shape)} for x in self.leaves]
        return {"args": self.args, "kwargs": self.kwargs, "leaves": leaves, "timestep": self.timestep}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str) -> CallForm:
        """The form that `to_dict` wrote. Raises CheckpointError naming `source`."""
        leaves = tuple(_leaf_from_dict(leaf, source) for leaf in json_field(data, "leaves", list, source))
        args, kwargs = (json_field(data, name, dict, source) for name in ("args", "kwargs"))
        timestep = data.get("timestep")
        if timestep is not None and json_field(data, "timestep", int, source) not in range(len(leaves)):
            raise CheckpointError(f"{source}: timestep={timestep!r}, want a leaf index or null; write it again")
        _check_node(args, "tuple", len(leaves), source)
        _check_node(kwargs, "dict", len(leaves), source)
        return cls(args=args, kwargs=kwargs, leaves=leaves, timestep=timestep)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the form."""
        return hashlib.sha256(json_bytes(self.to_dict())).digest()

    def call(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the call with these leaves."""
        args, kwargs = _rebuild(self.args, leaves), _rebuild(self.kwargs, leaves)
        return args, kwargs


def dtype_name(dtype: torch.dtype) -> str | None:
    """The name of a dtype that can be stored ("float32"), None for others."""
    name = str(dtype).removeprefix("torch.")
    return name if name in _DTYPES else None


def one_row(spec: LeafSpec, value: torch.Tensor) -> Any:
    """The value of a "whole" or "number" leaf as the module was called with it; `value` is [*shape]."""
    return value.item() if spec.kind == NUMBER else value


def _rebuild(node: Mapping[str, Any], leaves: Sequence[Any]) -> Any:
    ((tag, content),) = node.items()
    if tag == "leaf":
        return leaves[content]
    if tag == "value":
        return content
    if tag == "dict":
        return {key: _rebuild(inner, leaves) for key, inner in content}
    items = [_rebuild(inner, leaves) for inner in content]
    return items if tag == "list" else tuple(items)


def _leaf_from_dict(data: Any, source: str) -> LeafSpec:
    if not isinstance(data, dict):
        raise CheckpointError(f"{source}: leaf {data!r:.60}, want an object; edited, write it again")
    spec = LeafSpec(
        name=json_field(data, "name", str, source),
        kind=json_field(data, "kind", str, source),
        dtype=json_field(data, "dtype", str, source),
        shape=tuple(json_field(data, "shape", list, source)),
    )
    sizes = all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in spec.shape)
    if spec.kind not in (ROW, WHOLE, NUMBER) or spec.dtype not in _DTYPES or not sizes:
        raise CheckpointError(f"{source}: {replace(spec)}: unknown kind, dtype or shape; edited, write it again")
    return spec


def _check_node(node: Any, want: str | None, leaves: int, source: str) -> None:
    if not (isinstance(node, dict) and len(node) == 1) or (want is not None and want not in node):
        raise CheckpointError(f"{source}: call node {node!r:.60} is malformed; edited, write it again")
    ((tag, content),) = node.items()
    inner: list[Any] = []
    good = False
    if tag == "leaf":
        good = isinstance(content, int) and not isinstance(content, bool) and 0 <= content < leaves
    elif tag == "value":
        good = content is None or isinstance(content, (bool, str))
    elif tag in ("list", "tuple") and isinstance(content, list):
        good, inner = True, content
    elif tag == "dict" and isinstance(content, list):
        good = all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in content)
        inner = [pair[1] for pair in content] if good else []
    if not good:
        raise CheckpointError(f"{source}: call node {node!r:.60} is malformed; edited, write it again")
    for child in inner:
        _check_node(child, None, leaves, source)
