"""Views, permutations, slices, joins and resampling."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset15 as opset

from qdiff_fx.kernels.openvino_nodes.values import (
    Call,
    axes,
    constant,
    dimension,
    element_type,
    is_static,
    output,
    same_shape,
    same_size,
    size_vector,
)

aten = torch.ops.aten
Emit = Callable[..., Any]

_FURTHEST = 2**63 - 1
"""The end of a slice that has none."""


def _reshape(call: Call, x: Any, sizes: Any = None, *rest: Any) -> Any:
    """A view to the result's shape, with as little arithmetic of sizes as possible.

    A size that is the input's at the same place is written 0, one other that depends on the call -1; only what is
    left is computed while the model runs.
    """
    source, shape = call.fake(0).shape, call.value.shape
    if same_shape(source, shape):
        return output(x)
    pattern: list[Any] = []
    for index, size in enumerate(shape):
        if is_static(size):
            pattern.append(int(size))
        else:
            pattern.append(0 if index < len(source) and same_size(source[index], size) else None)
    if None in pattern:
        pattern[pattern.index(None)] = -1
    given = sizes if isinstance(sizes, (list, tuple)) and len(sizes) == len(shape) else [None] * len(shape)
    for index, size in enumerate(pattern):
        if size is None:
            size = given[index]
            if size is None or (is_static(size) and size == -1):
                raise call.refuse("two sizes that only the call tells")
            pattern[index] = size
    return opset.reshape(output(x), size_vector(pattern), True).output(0)


def _expand(call: Call, x: Any, sizes: Sequence[Any], implicit: bool = False) -> Any:
    shape, source = call.value.shape, call.fake(0).shape
    x = output(x)
    if same_shape(source, shape):
        return x
    offset = len(shape) - len(source)
    wanted: list[Any] = []
    for index, size in enumerate(sizes):
        kept = is_static(size) and size == -1
        wanted.append(dimension(x, index - offset) if kept else size)
    return opset.broadcast(x, size_vector(wanted), "BIDIRECTIONAL").output(0)


def _transpose(call: Call, x: Any, order: Sequence[int]) -> Any:
    return opset.transpose(output(x), axes(order)).output(0)


def _permute(call: Call, x: Any, order: Sequence[int]) -> Any:
    return _transpose(call, x, [item % len(order) for item in order])


def _swap(call: Call, x: Any, first: int = 0, second: int = 1) -> Any:
    rank = len(call.value.shape)
    if rank < 2:
        return output(x)
    order = list(range(rank))
    order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return _transpose(call, x, order)


def _unsqueeze(call: Call, x: Any, axis: int) -> Any:
    return opset.unsqueeze(output(x), constant(axis % len(call.value.shape))).output(0)


def _squeeze(call: Call, x: Any, dims: Any = None) -> Any:
    source = call.fake(0).shape
    dims = range(len(source)) if dims is None else [dims] if isinstance(dims, int) else dims
    ones = [item % len(source) for item in dims if is_static(source[item]) and source[item] == 1]
    return opset.squeeze(output(x), axes(ones)).output(0) if ones else output(x)


def _slice(call: Call, x: Any, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    x = output(x)
    if same_shape(call.fake(0).shape, call.value.shape):
        return x
    bounds = [
        size_vector([0 if start is None else start]),
        size_vector([_FURTHEST if end is None else end]),
        size_vector([step]),
    ]
    return opset.slice(x, *bounds, axes([axis % len(call.value.shape)])).output(0)


def _select(call: Call, x: Any, axis: int, index: Any) -> Any:
    return opset.gather(output(x), output(index, ov.Type.i64), constant(axis % len(call.fake(0).shape))).output(0)


def _concat(call: Call, tensors: Sequence[Any], axis: int = 0) -> Any:
    dtype = element_type(call.value.dtype)
    return opset.concat([output(item, dtype) for item in tensors], axis % len(call.value.shape)).output(0)


def _stack(call: Call, tensors: Sequence[Any], axis: int = 0) -> Any:
    dtype = element_type(call.value.dtype)
    axis = axis % len(call.value.shape)
    lifted = [opset.unsqueeze(output(item, dtype), constant(axis)) for item in tensors]
    return opset.concat(lifted, axis).output(0)


def _parts(call: Call, x: Any, how: Any, axis: int = 0) -> Any:
    """chunk, split and split_with_sizes, along an axis whose size does not change."""
    axis = axis % len(call.fake(0).shape)
    lengths = [part.shape[axis] for part in call.value]
    if not all(is_static(size) for size in lengths):
        raise call.refuse("parts along an axis whose size depends on the call")
    if len(set(lengths)) == 1:
        return opset.split(output(x), constant(axis), len(lengths)).outputs()
    return opset.variadic_split(output(x), constant(axis), axes(lengths)).outputs()


def _unbind(call: Call, x: Any, axis: int = 0) -> Any:
    position = constant(axis % len(call.fake(0).shape))
    return [opset.gather(output(x), constant(index), position).output(0) for index in range(len(call.value))]


def _getitem(call: Call, parts: Sequence[Any], index: int) -> Any:
    return parts[index]


def _nearest(call: Call, x: Any, size: Any = None, factors: Any = None) -> Any:
    positions = axes([2, 3])
    mode: dict[str, Any] = {
        "mode": "nearest",
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
        "axes": positions,
    }
    if factors is not None:
        scales = constant(np.array(factors, dtype=np.float32))
        return opset.interpolate(output(x), scales, shape_calculation_mode="scales", **mode).output(0)
    return opset.interpolate(output(x), size_vector(size), shape_calculation_mode="sizes", **mode).output(0)


def _pad(call: Call, x: Any, amounts: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    if mode != "constant":
        raise call.refuse(f"mode {mode!r}")
    rank = len(call.fake(0).shape)
    begin, end = [0] * rank, [0] * rank
    for index in range(len(amounts) // 2):
        begin[rank - 1 - index], end[rank - 1 - index] = amounts[2 * index], amounts[2 * index + 1]
    fill = constant(float(value or 0.0), ov.Type.f32)
    return opset.pad(output(x, ov.Type.f32), axes(begin), axes(end), "constant", fill).output(0)


def _constant_pad(call: Call, x: Any, amounts: Sequence[int], value: float = 0) -> Any:
    return _pad(call, x, amounts, "constant", value)


def _average(
    call: Call,
    x: Any,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    include_padding: bool = True,
    divisor: int | None = None,
) -> Any:
    if divisor is not None:
        raise call.refuse("a divisor of its own")
    kernel = pair(kernel)
    padding = pair(padding)
    rounding = "ceil" if ceil_mode else "floor"
    return opset.avg_pool(
        output(x), pair(stride) if stride else kernel, padding, padding, kernel, not include_padding, rounding
    ).output(0)


def pair(value: Any, count: int = 2) -> list[int]:
    """One number for each of `count` dimensions."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _size(call: Call, x: Any, axis: int) -> Any:
    return call.value if is_static(call.value) else dimension(x, axis % len(call.fake(0).shape))


def _same(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


SHAPES: Mapping[Any, Emit] = {
    aten.sym_size.int: _size,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.transpose.int: _swap,
    aten.t.default: _swap,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _concat,
    aten.concat.default: _concat,
    aten.stack.default: _stack,
    aten.chunk.default: _parts,
    aten.split.Tensor: _parts,
    aten.split_with_sizes.default: _parts,
    aten.unbind.int: _unbind,
    operator.getitem: _getitem,
    aten.upsample_nearest2d.vec: _nearest,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _constant_pad,
    aten.avg_pool2d.default: _average,
    aten.contiguous.default: _same,
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.dropout.default: _same,
}
"""By operator. Memory layouts are the plugin's own affair; dropout does nothing in a model that is not trained."""
