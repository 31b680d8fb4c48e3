"""What operators' results are in an OpenVINO model under construction, and how constants and sizes come into it.

A tensor is an `openvino.Output`; a stored one is a `Stored` until an operator reads it; a size is an int, or an int64
scalar `Output` where it depends on the call. Floating tensors are float32 whatever the carrier: the plugin itself puts
the casts, by the precision that the program is compiled for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset15 as opset
from torch import Tensor, fx

from qdiff_fx.errors import BackendError


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of the graph module that no operator has read yet."""

    tensor: Tensor
    cache: dict[str, Any] = field(default_factory=dict)

    def output(self) -> Any:
        """It as a constant, made once."""
        if "output" not in self.cache:
            self.cache["output"] = constant(self.tensor)
        return self.cache["output"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operator call: its node, and what it is known to return."""

    node: fx.Node

    @property
    def value(self) -> Any:
        """The fake result."""
        return self.node.meta["val"]

    def fake(self, index: int) -> Any:
        """The fake value of a positional argument."""
        return fake(self.node.args[index])

    def refuse(self, reason: str) -> BackendError:
        """The error for a call that cannot be brought to OpenVINO."""
        return BackendError(
            f"{self.node.name}: {self.node.target} with {reason} has no form in OpenVINO here; "
            "use backend='x86' or backend='reference'"
        )


def fake(item: Any) -> Any:
    """The fake value of an argument of an fx call."""
    return item.meta["val"] if isinstance(item, fx.Node) else item


def element_type(dtype: torch.dtype) -> Any:
    """OpenVINO's type for tensors of `dtype`."""
    if dtype.is_floating_point:
        return ov.Type.f32
    kinds = {torch.bool: ov.Type.boolean, torch.uint8: ov.Type.u8, torch.int8: ov.Type.i8}
    return kinds.get(dtype, ov.Type.i64)


def constant(value: Any, dtype: Any = None) -> Any:
    """A constant of a torch tensor, an array or a number."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.dtype.is_floating_point:
            value = value.to(torch.float32)
        elif value.dtype not in (torch.bool, torch.uint8, torch.int8):
            value = value.to(torch.int64)
        value = value.contiguous().numpy()
    array = np.asarray(value, None if dtype is None else dtype.to_dtype())
    return ov.op.Constant(np.ascontiguousarray(array).reshape(array.shape)).output(0)


def output(item: Any, dtype: Any = None) -> Any:
    """`item` as a tensor of the model, cast to `dtype` where it has another."""
    if isinstance(item, Stored):
        item = item.output()
    elif isinstance(item, (bool, int, float)):
        return constant(item, dtype or (ov.Type.f32 if isinstance(item, float) else ov.Type.i64))
    if dtype is not None and item.get_element_type() != dtype:
        item = opset.convert(item, dtype.get_type_name()).output(0)
    return item


def is_static(size: Any) -> bool:
    """Whether a size is the same in every call."""
    return isinstance(size, int)


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are equal in every call."""
    if is_static(left) or is_static(right):
        return is_static(left) and is_static(right) and left == right
    return bool(left.node.expr == right.node.expr)


def same_shape(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two shapes are equal in every call."""
    return len(left) == len(right) and all(same_size(a, b) for a, b in zip(left, right, strict=True))


def dimension(tensor: Any, axis: int) -> Any:
    """A size of a tensor, as an int64 scalar."""
    shape = opset.shape_of(output(tensor), "i64")
    return opset.gather(shape, constant(axis), constant(0)).output(0)


def size_vector(sizes: Sequence[Any]) -> Any:
    """Sizes as one int64 vector."""
    if all(is_static(size) for size in sizes):
        return constant(np.array(sizes, dtype=np.int64))
    parts = [opset.unsqueeze(output(size, ov.Type.i64), constant(0)) for size in sizes]
    return opset.concat(parts, 0).output(0)


def axes(values: Sequence[int]) -> Any:
    """Axes or other small integers as a constant vector."""
    return constant(np.array(list(values), dtype=np.int64))
