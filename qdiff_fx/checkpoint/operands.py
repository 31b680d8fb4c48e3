"""Checks on the operands of integer operators: their fake kernels trust what kernels would read past."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.graph.edit import get_tensor
from qdiff_fx.graph.record import refuse
from qdiff_fx.kernels import ops as ops  # registers the operators

qdiff = torch.ops.qdiff

_CODES_PER_BYTE = 2
_SHIFTS_PER_BYTE = 4
_HIGHEST_CODE = 255
_HIGHEST_WEIGHT_ZERO_POINT = 15
_DIMENSIONS: Mapping[Any, int] = {qdiff.conv2d.default: 4, qdiff.linear.default: 2}


def check_operands(graph_module: fx.GraphModule, where: str) -> None:
    """Raise CheckpointError, naming the node, if an integer operator's constants do not fit each other.

    Needs fake values on the nodes.
    """
    for node in graph_module.graph.nodes:
        check = _CHECKS.get(node.target) if node.op == "call_function" else None
        if check is None:
            continue
        names = [argument.name for argument in node.target._schema.arguments]
        arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        check(_Operands(graph_module, node, arguments, f"{where}: node {node.name}"))


class _Operands:
    """The arguments of one call; constants are looked up, a failed check names the node."""

    def __init__(self, graph_module: fx.GraphModule, node: fx.Node, arguments: Mapping[str, Any], where: str) -> None:
        self.graph_module, self.node, self.arguments, self.where = graph_module, node, arguments, where

    def require(self, holds: bool, problem: str) -> None:
        if not holds:
            refuse(self.where, problem)

    def constant(self, name: str, dtypes: Sequence[torch.dtype], shape: Sequence[int] | None) -> Tensor:
        """The stored tensor that is passed as `name`."""
        source = self.arguments[name]
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            refuse(self.where, f"{name} is no stored tensor")
        tensor = get_tensor(self.graph_module, source.target)
        fits = tensor.dtype in dtypes and (shape is None or tuple(tensor.shape) == tuple(shape))
        wanted = "" if shape is None else f" {list(shape)}"
        self.require(
            fits,
            f"{name} is {tensor.dtype} {list(tensor.shape)}, want {' or '.join(str(item) for item in dtypes)}{wanted}",
        )
        return tensor

    def scales(self, name: str, shape: Sequence[int]) -> None:
        tensor = self.constant(name, (torch.float32,), shape)
        self.require(bool((torch.isfinite(tensor) & (tensor > 0)).all()), f"{name} is not positive and finite")

    def number(self, name: str, lowest: int, highest: int) -> int:
        value = self.arguments[name]
        self.require(
            type(value) is int and lowest <= value <= highest, f"{name}={value!r:.60}, want {lowest}..{highest}"
        )
        return int(value)

    def numbers(self, name: str, count: int, lowest: int) -> list[int]:
        values = self.arguments[name]
        fits = isinstance(values, list) and len(values) == count
        fits = fits and all(type(value) is int and lowest <= value < 2**31 for value in values)
        self.require(fits, f"{name}={values!r:.60}, want {count} integers of at least {lowest}")
        return list(values)

    def positive(self, value: Any, name: str) -> None:
        fits = type(value) is float and math.isfinite(value) and value > 0
        self.require(fits, f"{name}={value!r:.60}, want a positive finite float")

    def shape(self, name: str) -> tuple[Any, ...]:
        """Shape of a computed operand; dynamic sizes are symbols."""
        source = self.arguments[name]
        value = source.meta.get("val") if isinstance(source, fx.Node) else None
        if not isinstance(value, Tensor):
            refuse(self.where, f"{name} is no tensor")
        return tuple(value.shape)

    def codes(self, name: str) -> tuple[Any, ...]:
        """Shape of an operand that holds uint8 codes."""
        shape = self.shape(name)
        dtype = self.arguments[name].meta["val"].dtype
        self.require(dtype == torch.uint8, f"{name} is {dtype}, want codes in torch.uint8")
        return shape


def _quantize(operands: _Operands) -> None:
    shape = operands.shape("x")
    qmin, qmax = operands.number("qmin", 0, _HIGHEST_CODE), operands.number("qmax", 1, _HIGHEST_CODE)
    operands.require(qmin < qmax, f"qmin={qmin}, qmax={qmax}")
    operands.number("zero_point", qmin, qmax)
    axis = operands.number("channel_axis", 0, len(shape) - 1)
    inv_scale = operands.constant("inv_scale", (torch.float32,), None)
    operands.scales("inv_scale", () if inv_scale.ndim == 0 else (shape[axis],))


def _layer(operands: _Operands) -> None:
    dimensions = _DIMENSIONS[operands.node.target]
    shape = operands.numbers("weight_shape", dimensions, 1)
    x_shape = operands.codes("x")
    groups, channel_axis = 1, -1
    if dimensions == 4:
        groups, channel_axis = operands.number("groups", 1, shape[0]), 1
        operands.require(len(x_shape) == 4 and shape[0] % groups == 0, f"groups={groups} for {shape[0]} outputs")
        for name, lowest in (("stride", 1), ("padding", 0), ("dilation", 1)):
            operands.numbers(name, 2, lowest)
    channels = shape[1] * groups
    operands.require(x_shape[channel_axis] == channels, f"x has {x_shape[channel_axis]} channels, want {channels}")
    _weight(operands, shape)
    if operands.arguments["channel_shift"] is not None:
        operands.require(operands.arguments["weight_zero_point"] is not None, "channel_shift needs packed weights")
        operands.constant("channel_shift", (torch.uint8,), (-(-channels // _SHIFTS_PER_BYTE),))
    if operands.arguments["bias"] is not None:
        operands.constant("bias", (torch.float32, torch.float16, torch.bfloat16, torch.float64), shape[:1])
    operands.positive(operands.arguments["x_scale"], "x_scale")
    operands.number("x_zero_point", 0, _HIGHEST_CODE)
    _output_dtype(operands)


def _dequantize_weight(operands: _Operands) -> None:
    shape = operands.arguments["weight_shape"]
    operands.require(isinstance(shape, list) and 2 <= len(shape) <= 5, f"weight_shape={shape!r:.60}")
    _weight(operands, operands.numbers("weight_shape", len(shape), 1))
    _output_dtype(operands)


def _weight(operands: _Operands, shape: Sequence[int]) -> None:
    operands.scales("weight_scale", shape[:1])
    if operands.arguments["weight_zero_point"] is None:
        operands.constant("weight", (torch.int8,), shape)
        return
    operands.constant("weight", (torch.uint8,), (-(-math.prod(shape) // _CODES_PER_BYTE),))
    zero_point = operands.constant("weight_zero_point", (torch.uint8,), shape[:1])
    operands.require(bool((zero_point <= _HIGHEST_WEIGHT_ZERO_POINT).all()), "weight_zero_point exceeds 4 bits")


def _output_dtype(operands: _Operands) -> None:
    dtype = operands.arguments["output_dtype"]
    operands.require(isinstance(dtype, torch.dtype) and dtype.is_floating_point, f"output_dtype={dtype!r:.60}")


def _attention(operands: _Operands) -> None:
    for name in ("operand_bits", "softmax_bits"):
        operands.require(operands.number(name, 0, 8) != 1, f"{name}=1")
    bits = operands.number("operand_bits", 0, 8)
    scales, zero_points = operands.arguments["operand_scales"], operands.arguments["operand_zero_points"]
    count = 3 if bits else 0
    fits = all(isinstance(item, list) and len(item) == count for item in (scales, zero_points))
    operands.require(fits, f"operand_bits={bits} wants {count} scales and zero points")
    for scale in scales:
        operands.positive(scale, "operand_scales")
    for zero_point in zero_points:
        fits = type(zero_point) is int and 0 <= zero_point < 2**bits
        operands.require(fits, f"zero point {zero_point!r:.60}, want 0..{2**bits - 1}")
    scale = operands.arguments["scale"]
    operands.require(scale is None or (type(scale) is float and math.isfinite(scale)), f"scale={scale!r:.60}")
    query, key, value = (operands.shape(name) for name in ("query", "key", "value"))
    fits = len(query) == len(key) == len(value) >= 2 and query[-1] == key[-1] and key[-2] == value[-2]
    operands.require(fits, f"q, k, v of shapes {list(query)}, {list(key)}, {list(value)} do not fit")


_CHECKS: Mapping[Any, Callable[[_Operands], None]] = {
    qdiff.quantize.default: _quantize,
    qdiff.conv2d.default: _layer,
    qdiff.linear.default: _layer,
    qdiff.dequantize_weight.default: _dequantize_weight,
    qdiff.attention.default: _attention,
}
