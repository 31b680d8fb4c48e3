"""Integer layers that every backend is tried on: their shapes, random operands, accumulators and error bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qdiff_fx.kernels import reference
from qdiff_fx.numerics.packing import pack_int4, pack_shifts

EXACT = 2**24
"""Up to this magnitude every integer is a float32."""

ROUNDING = 2.0**-24
"""One float32 rounding, relative."""


@dataclass(frozen=True, kw_only=True)
class Conv:
    batch: int = 2
    channels: int = 16
    outputs: int = 16
    size: tuple[int, int] = (8, 8)
    kernel: tuple[int, int] = (3, 3)
    stride: list[int] = field(default_factory=lambda: [1, 1])
    padding: list[int] = field(default_factory=lambda: [1, 1])
    dilation: list[int] = field(default_factory=lambda: [1, 1])
    groups: int = 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.outputs, self.channels // self.groups, *self.kernel)


CONVS = {
    "3x3": Conv(),
    "1x1": Conv(kernel=(1, 1), padding=[0, 0]),
    "1x1-stride2": Conv(kernel=(1, 1), padding=[0, 0], stride=[2, 2]),
    "1x1-padded": Conv(kernel=(1, 1)),
    "3x3-stride2": Conv(stride=[2, 2]),
    "no-padding": Conv(padding=[0, 0]),
    "padding2": Conv(padding=[2, 2]),
    "dilated": Conv(padding=[2, 2], dilation=[2, 2]),
    "groups": Conv(groups=4),
    "groups-of-odd-channels": Conv(channels=15, outputs=21, groups=3, stride=[2, 2], size=(7, 6)),
    "depthwise": Conv(groups=16),
    "odd-size": Conv(size=(7, 5)),
    "odd-channels": Conv(channels=5, outputs=7),
    "96-channels": Conv(channels=96, outputs=96, size=(7, 7)),
    "one-channel": Conv(channels=1, outputs=3),
    "as-conv1d": Conv(size=(1, 9), kernel=(1, 3), padding=[0, 1]),
    "batch1": Conv(batch=1),
    "batch3-stride2-odd": Conv(batch=3, channels=24, outputs=40, size=(9, 11), stride=[2, 2]),
    "batch4-padding-by-axis": Conv(batch=4, channels=12, outputs=20, size=(6, 9), kernel=(3, 5), padding=[0, 2]),
    "batch5": Conv(batch=5, channels=33, outputs=31),
    "empty-batch": Conv(batch=0),
}

LINEARS = {
    "plain": ((4, 16), 32),
    "sequence": ((2, 7, 16), 32),
    "four-dimensional": ((2, 3, 4, 16), 8),
    "odd": ((3, 17), 33),
    "one-feature": ((5, 16), 1),
    "320": ((2, 9, 320), 320),
    "empty": ((0, 16), 8),
    "empty-sequence": ((2, 0, 16), 8),
    "empty-batch": ((0, 7, 16), 8),
}

STORED = ("int8", "int4", "int4-shifted")


class Operands:
    """Random codes and weights in one stored form; scales of 1 unless `scaled`. Codes are at most `last`."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        weight_shape: tuple[int, ...],
        stored: str,
        *,
        last: int,
        groups: int = 1,
        scaled: bool,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        outputs = weight_shape[0]
        codes = {"dtype": torch.uint8, "generator": generator}
        self.x = torch.randint(0, last + 1, input_shape, **codes)
        self.weight_shape, self.groups = weight_shape, groups
        self.tensors: dict[str, Tensor | None] = dict.fromkeys(("zero_point", "shift", "bias"))
        if stored == "int8":
            weight = torch.randint(-127, 128, weight_shape, dtype=torch.int8, generator=generator)
        else:
            weight = pack_int4(torch.randint(0, 16, weight_shape, **codes))
            self.tensors["zero_point"] = torch.randint(0, 16, (outputs,), **codes)
            if stored == "int4-shifted":
                channels = weight_shape[1] * groups
                self.tensors["shift"] = pack_shifts(torch.randint(0, 4, (channels,), **codes))
        scale = torch.rand(outputs, generator=generator) + 0.5 if scaled else torch.ones(outputs)
        self.tensors |= {"weight": weight, "scale": scale}
        if scaled:
            self.tensors["bias"] = 1000 * torch.randn(outputs, generator=generator)
        self.x_scale = 0.37 if scaled else 1.0

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]

    @property
    def integers(self) -> Tensor:
        """The weight as int8, zero points and shifts folded in."""
        return reference.integer_weight(
            self["weight"], self["zero_point"], self["shift"], self.weight_shape, self.groups
        )


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What a layer sums up, by output.

    Args:
      accumulator: the sum of (code - zero point) * weight, int32.
      magnitude: the sum of the terms' magnitudes.
      terms: how many terms a sum has.
    """

    accumulator: Tensor
    magnitude: Tensor
    terms: int


def conv_sums(case: Conv, operands: Operands, zero_point: int) -> Sums:
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    weight = operands.integers
    distance = (operands.x.int() - zero_point).abs().to(torch.uint8)
    return Sums(
        accumulator=reference.conv2d_accumulator(operands.x, zero_point, weight, *geometry),
        magnitude=reference.conv2d_accumulator(distance, 0, weight.abs(), *geometry),
        terms=weight[0].numel(),
    )


def linear_sums(operands: Operands, zero_point: int) -> Sums:
    weight = operands.integers
    distance = (operands.x.int() - zero_point).abs().to(torch.uint8)
    return Sums(
        accumulator=reference.linear_accumulator(operands.x, zero_point, weight),
        magnitude=reference.linear_accumulator(distance, 0, weight.abs()),
        terms=weight[0].numel(),
    )


def rounding_bound(backend: str, operands: Operands, sums: Sums, axis: int) -> Tensor:
    """How far a backend's scaled output may lie from the exact one, by output.

    Where accumulators are integers, 1e-6 (|acc * scale| + |bias|): a few float32 roundings of 6e-8 each. openvino adds
    the zero point's share in float32, so it rounds relative to the largest sum that codes can make. qdq sums in
    float32: code, weight and product of each term are rounded, and so is every addition.
    """
    shape = [1] * sums.accumulator.ndim
    shape[axis] = -1
    scale = (operands["scale"].double() * operands.x_scale).view(shape)
    bias = operands["bias"].double().view(shape).abs()
    if backend == "qdq":
        # The codes' zero point is taken off exactly, in integers.
        return ((sums.terms + 4) * ROUNDING * sums.magnitude.double() * scale) + 2 * ROUNDING * bias
    if backend == "openvino":
        largest = 255.0 * operands.integers.flatten(1).double().abs().sum(1).view(shape)
    else:
        largest = sums.accumulator.double().abs()
    return 1e-6 * (largest * scale + bias)


def exact_output(operands: Operands, sums: Sums, axis: int) -> Tensor:
    """acc * s_x * s_w + bias in float64."""
    shape = [1] * sums.accumulator.ndim
    shape[axis] = -1
    scale = (operands["scale"].double() * operands.x_scale).view(shape)
    return sums.accumulator.double() * scale + operands["bias"].double().view(shape)
