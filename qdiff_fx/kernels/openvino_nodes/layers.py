"""Convolutions, linears and their quantize steps, normalisation and attention.

How an integer layer is written so that the plugin keeps it on integers: the activation passes a FakeQuantize of 256
levels whose output range is the grid in real units, the weight is an int8 constant behind Convert and Multiply. Where
no padding needs the zero point, the output range begins at 0 instead and the bias takes the difference: sum over c of
-z w[o, c], which is exact and leaves plain unsigned codes, as fully connected kernels want them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset15 as opset
from torch import Tensor

from qdiff_fx.graph.edit import layer_call
from qdiff_fx.kernels.openvino_nodes.shapes import pair
from qdiff_fx.kernels.openvino_nodes.values import Call, Stored, axes, constant, output
from qdiff_fx.kernels.reference import integer_weight
from qdiff_fx.numerics.affine import along_axis

aten = torch.ops.aten
qdiff = torch.ops.qdiff
Emit = Callable[..., Any]

_LEVELS = 256
_LAST = 255


@dataclass(frozen=True, kw_only=True)
class Codes:
    """What a quantize step will make of `x`, emitted when a layer reads it.

    Args:
      x: the tensor in real units.
      inv_scale: [] or [C] along `axis` of `rank` dimensions.
      zero_point, qmin, qmax: the integer grid.
      emitted: FakeQuantize outputs by form, made once for all readers.
    """

    x: Any
    inv_scale: Tensor
    zero_point: int
    qmin: int
    qmax: int
    axis: int
    rank: int
    emitted: dict[Any, Any] = field(default_factory=dict)

    def dequantized(self, scale: float, *, from_zero: bool) -> Any:
        """`x` on its grid, in real units; or, `from_zero`, higher by the zero point: scale times the code itself."""
        key = (scale, from_zero)
        if key not in self.emitted:
            self.emitted[key] = self._emit(scale, from_zero)
        return self.emitted[key]

    def _emit(self, scale: float, from_zero: bool) -> Any:
        x, axis, inverse = self.x, self.axis % self.rank, self.inv_scale.detach().cpu().double()
        if (self.qmin, self.qmax) != (0, _LAST):
            # Before the factors: a clamp between Multiply and FakeQuantize is lost when the plugin fuses the three.
            low, high = self._bounds(inverse, self.qmin, self.qmax)
            x = opset.minimum(opset.maximum(x, constant(low)), constant(high)).output(0)
        # FakeQuantize takes a range a channel in [B, C, H, W] only; elsewhere the factors are multiplied on.
        if inverse.ndim and (self.rank != 4 or axis != 1):
            x = opset.multiply(x, constant(along_axis((inverse * scale).float(), self.rank, axis))).output(0)
            inverse = torch.tensor(1.0 / scale, dtype=torch.float64)
        low, high = self._bounds(inverse, 0, _LAST)
        first = 0 if from_zero else -self.zero_point
        grid = [np.float32(first * scale), np.float32((first + _LAST) * scale)]
        return opset.fake_quantize(x, constant(low), constant(high), *map(constant, grid), _LEVELS).output(0)

    def _bounds(self, inverse: Tensor, *codes: int) -> list[Tensor]:
        """What stands for each code in real units, float32, by channel where `inverse` is."""
        real = [(code - self.zero_point) / inverse for code in codes]
        return [along_axis(item.float(), self.rank, self.axis % self.rank) for item in real]

    def integers(self) -> Any:
        """The codes themselves, as uint8."""
        factor = along_axis(self.inv_scale.detach().float(), self.rank, self.axis % self.rank)
        rounded = opset.round(opset.multiply(self.x, constant(factor)), "half_to_even")
        shifted = opset.add(rounded, constant(float(self.zero_point), ov.Type.f32))
        bounds = [constant(float(item), ov.Type.f32) for item in (self.qmin, self.qmax)]
        return opset.convert(opset.minimum(opset.maximum(shifted, bounds[0]), bounds[1]), "u8").output(0)


def _quantize(call: Call, x: Any, inv_scale: Stored, zero_point: int, qmin: int, qmax: int, axis: int) -> Codes:
    return Codes(
        x=output(x, ov.Type.f32),
        inv_scale=inv_scale.tensor,
        zero_point=zero_point,
        qmin=qmin,
        qmax=qmax,
        axis=axis,
        rank=len(call.value.shape),
    )


def unsqueezed(codes: Codes, axis: int) -> Codes:
    """Codes with one more dimension: a conv1d that runs as a conv2d."""
    axis %= codes.rank + 1
    channels = codes.axis % codes.rank
    x = opset.unsqueeze(codes.x, constant(axis)).output(0)
    return replace(codes, x=x, axis=channels + (axis <= channels), rank=codes.rank + 1, emitted={})


def _integer_conv2d(
    call: Call,
    x: Any,
    weight: Stored,
    weight_scale: Stored,
    weight_zero_point: Stored | None,
    channel_shift: Stored | None,
    bias: Stored | None,
    x_scale: float,
    x_zero_point: int,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
) -> Any:
    integers = _integers(weight, weight_zero_point, channel_shift, weight_shape, groups)
    from_zero = not any(padding)
    shift = _code_shift(integers, weight_scale.tensor, x_scale * x_zero_point) if from_zero else None
    product = convolution(
        call,
        _operand(x, x_scale, x_zero_point, from_zero),
        weight_in_real_units(integers, weight_scale.tensor),
        geometry=(list(stride), list(padding), list(dilation)),
        groups=groups,
        shape=weight_shape,
    )
    return _with_bias(product, None if bias is None else bias.tensor, shift, 4)


def _integer_linear(
    call: Call,
    x: Any,
    weight: Stored,
    weight_scale: Stored,
    weight_zero_point: Stored | None,
    channel_shift: Stored | None,
    bias: Stored | None,
    x_scale: float,
    x_zero_point: int,
    weight_shape: Sequence[int],
    dtype: torch.dtype,
) -> Any:
    integers = _integers(weight, weight_zero_point, channel_shift, weight_shape, 1)
    shift = _code_shift(integers, weight_scale.tensor, x_scale * x_zero_point)
    operand = _operand(x, x_scale, x_zero_point, True)
    product = opset.matmul(operand, weight_in_real_units(integers, weight_scale.tensor), False, True)
    product.set_friendly_name(call.node.name)
    return _with_bias(product.output(0), None if bias is None else bias.tensor, shift, 1)


def _integers(
    weight: Stored, zero_point: Stored | None, shift: Stored | None, shape: Sequence[int], groups: int
) -> Tensor:
    tensors = [None if item is None else item.tensor.detach() for item in (zero_point, shift)]
    return integer_weight(weight.tensor.detach(), tensors[0], tensors[1], shape, groups)


def _operand(x: Any, scale: float, zero_point: int, from_zero: bool) -> Any:
    if isinstance(x, Codes):
        return x.dequantized(scale, from_zero=from_zero)
    real = opset.convert(output(x), "f32").output(0)
    if zero_point and not from_zero:
        real = opset.subtract(real, constant(float(zero_point), ov.Type.f32)).output(0)
    return opset.multiply(real, constant(scale, ov.Type.f32)).output(0)


def weight_in_real_units(integers: Tensor, scale: Tensor) -> Any:
    """int8 `integers` [O, ...] times `scale` [O], in the form that the plugin keeps on integers."""
    real = opset.convert(constant(integers), "f32")
    return opset.multiply(real, constant(along_axis(scale.detach().float(), integers.ndim, 0))).output(0)


def _code_shift(integers: Tensor, weight_scale: Tensor, offset: float) -> Tensor:
    """What a layer's output is too high by when its input codes are read without their zero point, [O]."""
    sums = integers.flatten(1).sum(1, dtype=torch.int64).double()
    return sums * weight_scale.detach().double() * offset


def _with_bias(product: Any, bias: Tensor | None, shift: Tensor | None, rank: int) -> Any:
    total = None if bias is None else bias.detach().double()
    if shift is not None and bool(shift.any()):
        total = -shift if total is None else total - shift
    if total is None:
        return product
    return opset.add(product, constant(along_axis(total.float(), rank, 1 if rank == 4 else 0))).output(0)


def convolution(
    call: Call,
    x: Any,
    weight: Any,
    *,
    geometry: tuple[list[int], list[int], list[int]],
    groups: int,
    shape: Sequence[int],
) -> Any:
    """A convolution of real-valued operands, named like the fx node; OpenVINO has groups as a dimension of weights."""
    stride, padding, dilation = geometry
    if groups == 1:
        node = opset.convolution(x, weight, stride, padding, padding, dilation)
    else:
        split = axes([groups, shape[0] // groups, *shape[1:]])
        weight = opset.reshape(weight, split, False)
        node = opset.group_convolution(x, weight, stride, padding, padding, dilation)
    node.set_friendly_name(call.node.name)
    return node.output(0)


def _carrier_layer(call: Call, *args: Any, **kwargs: Any) -> Any:
    """conv1d, conv2d and linear on real weights."""
    layer = layer_call(call.node)
    assert layer is not None
    names = ("input", "weight", "bias")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, weight, bias = output(given["input"], ov.Type.f32), output(given["weight"]), given.get("bias")
    if layer.operator == "linear":
        node = opset.matmul(x, weight, False, True)
        node.set_friendly_name(call.node.name)
        return node.output(0) if bias is None else opset.add(node, output(bias)).output(0)
    shape = layer.weight.meta["val"].shape
    count = len(shape) - 2
    stride, dilation = pair(layer.stride, count), pair(layer.dilation, count)
    padding = layer.padding
    if isinstance(padding, str):
        total = [step * (size - 1) for step, size in zip(dilation, shape[2:], strict=True)]
        if padding == "same" and any(item % 2 for item in total):
            raise call.refuse("padding 'same' around an even kernel")
        padding = [item // 2 for item in total] if padding == "same" else 0
    result = convolution(
        call, x, weight, geometry=(stride, pair(padding, count), dilation), groups=layer.groups, shape=shape
    )
    if bias is None:
        return result
    return opset.add(result, opset.reshape(output(bias), axes([1, -1, *[1] * count]), False)).output(0)


def _group_norm(
    call: Call, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True
) -> Any:
    channels = int(call.fake(0).shape[1])
    scale = constant(torch.ones(channels, dtype=torch.float32)) if weight is None else output(weight)
    offset = constant(torch.zeros(channels, dtype=torch.float32)) if bias is None else output(bias)
    return opset.group_normalization(output(x), scale, offset, groups, eps).output(0)


def _layer_norm(
    call: Call,
    x: Any,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Any:
    result = opset.mvn(output(x), axes(range(-len(shape), 0)), True, eps, "inside_sqrt")
    if weight is not None:
        result = opset.multiply(result, output(weight))
    if bias is not None:
        result = opset.add(result, output(bias))
    return result.output(0)


def _matmul(call: Call, left: Any, right: Any) -> Any:
    return opset.matmul(output(left, ov.Type.f32), output(right, ov.Type.f32), False, False).output(0)


LAYERS: Mapping[Any, Emit] = {
    qdiff.quantize.default: _quantize,
    qdiff.conv2d.default: _integer_conv2d,
    qdiff.linear.default: _integer_linear,
    aten.conv1d.default: _carrier_layer,
    aten.conv1d.padding: _carrier_layer,
    aten.conv2d.default: _carrier_layer,
    aten.conv2d.padding: _carrier_layer,
    aten.linear.default: _carrier_layer,
    aten.group_norm.default: _group_norm,
    aten.layer_norm.default: _layer_norm,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
}
