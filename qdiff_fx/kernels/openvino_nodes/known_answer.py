"""Whether OpenVINO's integer kernels count right on this CPU."""

from __future__ import annotations

import openvino as ov
import torch
from openvino import opset15 as opset

from qdiff_fx.kernels.openvino_nodes.program import Program
from qdiff_fx.kernels.openvino_nodes.values import axes, constant

_CHANNELS = 64


def known_answers_hold() -> bool:
    """Whether a linear and a convolution of the largest codes come out right.

    Each pair of products, 2 * 255 * 127, exceeds int16: without VNNI kernels add pairs in 16 bits, saturating.
    """
    x = opset.parameter(ov.PartialShape([1, _CHANNELS]), ov.Type.u8, name="x")
    real = opset.multiply(opset.convert(x, "f32"), constant(1.0, ov.Type.f32))
    image = opset.reshape(real, axes([1, _CHANNELS, 1, 1]), False)
    linear = opset.matmul(real, _weight((_CHANNELS, _CHANNELS)), False, True)
    conv = opset.convolution(image, _weight((_CHANNELS, _CHANNELS, 3, 3)), [1, 1], [1, 1], [1, 1], [1, 1])
    model = ov.Model([opset.result(linear), opset.result(conv)], [x], "known_answer")
    outputs = [torch.empty(0), torch.empty(0)]
    program = Program(model, outputs, sequence=True, carrier=torch.float32, threads=1)
    found = program(torch.full((1, _CHANNELS), 255, dtype=torch.uint8))
    return all(bool((item == 255.0 * 127.0 * _CHANNELS).all()) for item in found)


def _weight(shape: tuple[int, ...]) -> ov.Output:
    integers = opset.convert(constant(torch.full(shape, 127, dtype=torch.int8)), "f32")
    scale = constant(torch.ones((shape[0], *[1] * (len(shape) - 1))))
    return opset.multiply(integers, scale).output(0)
