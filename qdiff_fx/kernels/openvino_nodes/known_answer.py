"""Whether OpenVINO's integer kernels count right on this CPU."""

from __future__ import annotations

import openvino as ov
import torch
from openvino import opset15 as opset

from qdiff_fx.kernels.openvino_nodes.layers import Codes, weight_in_real_units
from qdiff_fx.kernels.openvino_nodes.program import Program
from qdiff_fx.kernels.openvino_nodes.values import axes

_CHANNELS = 64


def known_answers_hold() -> bool:
    """Whether a linear and a convolution of the largest codes come out right, on kernels for integers.

    Each pair of products, 2 * 255 * 127, exceeds int16: without VNNI kernels add pairs in 16 bits, saturating.
    """
    program = question()
    placement = program.placement()
    if not (placement["linear"].is_integer and placement["conv"].is_integer):
        return False
    found = program(torch.full((1, _CHANNELS, 1, 1), 255.0, dtype=torch.float32))
    return all(bool((item == 255.0 * 127.0 * _CHANNELS).all()) for item in found)


def question() -> Program:
    """Both layers, "linear" and "conv", written as those of networks are.

    The plugin runs other forms, such as uint8 inputs, in floating point, where nothing saturates.
    """
    x = opset.parameter(ov.PartialShape([1, _CHANNELS, 1, 1]), ov.Type.f32, name="x")
    codes = Codes(
        x=x.output(0), inv_scale=torch.tensor(1.0, dtype=torch.float32), zero_point=0, qmin=0, qmax=255, axis=1, rank=4
    )
    real = codes.dequantized(1.0, from_zero=True)
    scale = torch.ones(_CHANNELS, dtype=torch.float32)
    weight, kernel = (
        weight_in_real_units(torch.full(shape, 127, dtype=torch.int8), scale)
        for shape in ((_CHANNELS, _CHANNELS), (_CHANNELS, _CHANNELS, 3, 3))
    )
    linear = opset.matmul(opset.reshape(real, axes([1, _CHANNELS]), False), weight, False, True)
    conv = opset.convolution(real, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    for name, layer in (("linear", linear), ("conv", conv)):
        layer.set_friendly_name(name)
    model = ov.Model([opset.result(linear), opset.result(conv)], [x], "known_answer")
    outputs = [torch.empty(0, dtype=torch.float32)] * 2
    return Program(model, outputs, sequence=True, carrier=torch.float32, threads=1)
