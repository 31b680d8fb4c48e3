"""Arithmetic, comparisons, activations, reductions, casts and factories."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import openvino as ov
import torch
from openvino import opset15 as opset
from torch import Tensor

from qdiff_fx.kernels.openvino_nodes.values import Call, axes, constant, element_type, output, size_vector

aten = torch.ops.aten
Emit = Callable[..., Any]


def _common(call: Call, left: Any, right: Any) -> tuple[Any, Any]:
    """Both operands in the type that the computation runs in."""
    fakes = [call.fake(0), call.fake(1)]
    dtypes = [element_type(item.dtype) for item in fakes if isinstance(item, Tensor)]
    value = call.value
    floating = ov.Type.f32 in dtypes or any(isinstance(item, (float, torch.SymFloat)) for item in fakes)
    floating = floating or (isinstance(value, Tensor) and value.dtype.is_floating_point)
    wide = ov.Type.boolean if dtypes and all(item == ov.Type.boolean for item in dtypes) else ov.Type.i64
    dtype = ov.Type.f32 if floating else wide
    return output(left, dtype), output(right, dtype)


def _binary(emit: Emit) -> Emit:
    def run(call: Call, left: Any, right: Any) -> Any:
        return emit(*_common(call, left, right)).output(0)

    return run


def _scaled(emit: Emit) -> Emit:
    """add and sub, whose second operand may have a factor."""

    def run(call: Call, left: Any, right: Any, alpha: float = 1) -> Any:
        left, right = _common(call, left, right)
        if alpha != 1:
            right = opset.multiply(right, constant(alpha, right.get_element_type()))
        return emit(left, right).output(0)

    return run


def _unary(emit: Emit) -> Emit:
    """A function of one tensor; integers become floats where the result is one."""

    def run(call: Call, x: Any) -> Any:
        return emit(output(x, element_type(call.value.dtype))).output(0)

    return run


def _reverse_sub(call: Call, left: Any, right: Any, alpha: float = 1) -> Any:
    left, right = _common(call, left, right)
    if alpha != 1:
        left = opset.multiply(left, constant(alpha, left.get_element_type()))
    return opset.subtract(right, left).output(0)


def _reciprocal(x: Any) -> Any:
    return opset.divide(constant(1.0, ov.Type.f32), x)


def _gelu(call: Call, x: Any, approximate: str = "none") -> Any:
    return opset.gelu(output(x), "erf" if approximate == "none" else "tanh").output(0)


def _clamp(call: Call, x: Any, low: Any = None, high: Any = None) -> Any:
    dtype = element_type(call.value.dtype)
    x = output(x, dtype)
    if low is not None:
        x = opset.maximum(x, output(low, dtype)).output(0)
    if high is not None:
        x = opset.minimum(x, output(high, dtype)).output(0)
    return x


def _softmax(call: Call, x: Any, axis: int, dtype: Any = None) -> Any:
    return opset.softmax(output(x, ov.Type.f32), axis % len(call.value.shape)).output(0)


def _reduction(emit: Emit) -> Emit:
    def run(call: Call, x: Any, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
        rank = len(call.fake(0).shape)
        dims = range(rank) if not dims and dims != 0 else [dims] if isinstance(dims, int) else dims
        positions = axes([item % rank for item in dims])
        return emit(output(x, element_type(call.value.dtype)), positions, keepdim).output(0)

    return run


def _where(call: Call, condition: Any, left: Any, right: Any) -> Any:
    dtype = element_type(call.value.dtype)
    return opset.select(output(condition, ov.Type.boolean), output(left, dtype), output(right, dtype)).output(0)


def _masked_fill(call: Call, x: Any, mask: Any, value: Any) -> Any:
    return _where(call, mask, value, x)


def _cast(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    return output(x, element_type(call.value.dtype))


def _arange(call: Call, *bounds: Any, **options: Any) -> Any:
    start, stop, step = {1: (0, *bounds, 1), 2: (*bounds, 1), 3: bounds}[len(bounds)]
    dtype = element_type(call.value.dtype)
    return opset.range(output(start, dtype), output(stop, dtype), output(step, dtype), dtype.get_type_name()).output(0)


def _full(call: Call, size: Any, value: Any, **options: Any) -> Any:
    dtype = element_type(call.value.dtype)
    return opset.broadcast(output(value, dtype), size_vector(size)).output(0)


def _filled(value: float) -> Emit:
    return lambda call, size, **options: _full(call, size, value)


def _filled_like(value: float) -> Emit:
    def run(call: Call, x: Any, **options: Any) -> Any:
        dtype = element_type(call.value.dtype)
        return opset.broadcast(output(value, dtype), opset.shape_of(output(x), "i64")).output(0)

    return run


def _sizes(number: Callable[..., Any], emit: Emit) -> Emit:
    """Arithmetic of sizes: on numbers itself, else on int64 scalars."""

    def run(call: Call, *items: Any) -> Any:
        if not any(isinstance(item, ov.Output) for item in items):
            return number(*items)
        return emit(*(output(item, ov.Type.i64) for item in items)).output(0)

    return run


_ADD = _scaled(opset.add)
_SUBTRACT = _scaled(opset.subtract)
_MULTIPLY, _DIVIDE, _POWER = _binary(opset.multiply), _binary(opset.divide), _binary(opset.power)
_CLAMP_MIN: Emit = lambda call, x, low: _clamp(call, x, low)  # noqa: E731
_CLAMP_MAX: Emit = lambda call, x, high: _clamp(call, x, None, high)  # noqa: E731
_SILU: Emit = _unary(opset.swish)

ELEMENTWISE: Mapping[Any, Emit] = {
    aten.add.Tensor: _ADD,
    aten.add.Scalar: _ADD,
    aten.add_.Tensor: _ADD,
    aten.sub.Tensor: _SUBTRACT,
    aten.sub.Scalar: _SUBTRACT,
    aten.rsub.Tensor: _reverse_sub,
    aten.rsub.Scalar: _reverse_sub,
    aten.mul.Tensor: _MULTIPLY,
    aten.mul.Scalar: _MULTIPLY,
    aten.mul_.Tensor: _MULTIPLY,
    aten.div.Tensor: _DIVIDE,
    aten.div.Scalar: _DIVIDE,
    aten.div_.Tensor: _DIVIDE,
    aten.true_divide.Tensor: _DIVIDE,
    aten.pow.Tensor_Scalar: _POWER,
    aten.pow.Tensor_Tensor: _POWER,
    aten.pow.Scalar: _POWER,
    aten.minimum.default: _binary(opset.minimum),
    aten.maximum.default: _binary(opset.maximum),
    aten.eq.Scalar: _binary(opset.equal),
    aten.eq.Tensor: _binary(opset.equal),
    aten.ne.Scalar: _binary(opset.not_equal),
    aten.ne.Tensor: _binary(opset.not_equal),
    aten.lt.Scalar: _binary(opset.less),
    aten.lt.Tensor: _binary(opset.less),
    aten.le.Scalar: _binary(opset.less_equal),
    aten.le.Tensor: _binary(opset.less_equal),
    aten.gt.Scalar: _binary(opset.greater),
    aten.gt.Tensor: _binary(opset.greater),
    aten.ge.Scalar: _binary(opset.greater_equal),
    aten.ge.Tensor: _binary(opset.greater_equal),
    aten.logical_not.default: lambda call, x: opset.logical_not(output(x, ov.Type.boolean)).output(0),
    aten.neg.default: _unary(opset.negative),
    aten.abs.default: _unary(opset.abs),
    aten.exp.default: _unary(opset.exp),
    aten.log.default: _unary(opset.log),
    aten.sin.default: _unary(opset.sin),
    aten.cos.default: _unary(opset.cos),
    aten.sqrt.default: _unary(opset.sqrt),
    aten.rsqrt.default: _unary(lambda x: _reciprocal(opset.sqrt(x))),
    aten.reciprocal.default: _unary(_reciprocal),
    aten.square.default: _unary(lambda x: opset.multiply(x, x)),
    aten.erf.default: _unary(opset.erf),
    aten.silu.default: _SILU,
    aten.silu_.default: _SILU,
    aten.sigmoid.default: _unary(opset.sigmoid),
    aten.tanh.default: _unary(opset.tanh),
    aten.relu.default: _unary(opset.relu),
    aten.relu_.default: _unary(opset.relu),
    aten.mish.default: _unary(opset.mish),
    aten.gelu.default: _gelu,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _CLAMP_MIN,
    aten.clamp_max.default: _CLAMP_MAX,
    aten.softmax.int: _softmax,
    aten.mean.dim: _reduction(opset.reduce_mean),
    aten.mean.default: _reduction(opset.reduce_mean),
    aten.sum.dim_IntList: _reduction(opset.reduce_sum),
    aten.sum.default: _reduction(opset.reduce_sum),
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten.to.device: _cast,
    aten.to.other: _cast,
    aten._to_copy.default: _cast,
    aten.type_as.default: _cast,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.full.default: _full,
    aten.ones.default: _filled(1),
    aten.zeros.default: _filled(0),
    aten.ones_like.default: _filled_like(1),
    aten.zeros_like.default: _filled_like(0),
    operator.add: _sizes(operator.add, opset.add),
    operator.sub: _sizes(operator.sub, opset.subtract),
    operator.mul: _sizes(operator.mul, opset.multiply),
    operator.floordiv: _sizes(operator.floordiv, opset.divide),
    operator.mod: _sizes(operator.mod, opset.floor_mod),
    operator.neg: _sizes(operator.neg, opset.negative),
    math.floor: lambda call, x: x,
    math.trunc: lambda call, x: x,
}
"""By operator. In-place forms are functional here: nothing reads what they overwrote."""
