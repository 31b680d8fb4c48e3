"""Which layers run faster in the carrier type than on x86's integer kernels.

Timed is what a step of the compiled network pays for the layer. On integers that is the kernel, and the quantize step
where no compiler can put it into the kernel that writes its input (behind another layer, an attention or the caller);
such a step stands in the timing as one pass from the carrier type to bytes. Steps that fuse cost nothing: the producer
writes a byte an element in place of the carrier type. Linears that read the same codes are timed as the one call that
they are merged into, against one call each in the carrier type. Layers that read codes through a view stay on integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.autotune.choose import Subject
from qdiff_fx.autotune.layer_size import LayerSize, layer_size
from qdiff_fx.autotune.timer import interleaved, processor_seconds
from qdiff_fx.graph.meta import LayerTiming
from qdiff_fx.kernels.x86 import OUTPUT_DTYPES, conv2d_call, linear_call
from qdiff_fx.kernels.x86_native import NativeKernels, kernel_digest, native_kernels
from qdiff_fx.passes.lower.integer_layers import IntegerLayer, integer_layer, sibling_linears

aten = torch.ops.aten
qdiff = torch.ops.qdiff


def subjects(graph_module: fx.GraphModule) -> Iterator[Subject]:
    """Layers between whose kernels there is a choice; quantize steps shared before."""
    kernels = native_kernels()
    code = "" if kernels is None else f"{kernels.name} {kernel_digest()} "  # other code takes another time
    for unit in _units(graph_module):
        if unit[0].output_dtype in OUTPUT_DTYPES:
            yield _subject(unit, kernels, code)


def _subject(unit: list[IntegerLayer], kernels: NativeKernels | None, code: str) -> Subject:
    small = kernels is not None and kernels.saturates and all(_has_small_weights(layer) for layer in unit)
    size = layer_size(unit, weights="int4" if small else "")
    nodes = tuple(layer.node for layer in unit)
    return Subject(nodes=nodes, key=code + size.key, dtype=size.dtype, measure=lambda: measure(size))


def _has_small_weights(layer: IntegerLayer) -> bool:
    """As kernels whose products saturate are faster with: 4 bits, without shifts."""
    return layer.weight_zero_point is not None and layer.channel_shift is None


def measure(size: LayerSize) -> LayerTiming:
    """Medians of interleaved runs on random operands."""
    with torch.inference_mode():
        runs = (_linear_runs if size.geometry is None else _conv2d_runs)(size)
        integer, carrier = interleaved(runs, processor_seconds)
    return LayerTiming(integer=round(1e6 * integer, 2), carrier=round(1e6 * carrier, 2))


def _conv2d_runs(size: LayerSize) -> tuple[Callable[[], Any], Callable[[], Any]]:
    assert size.geometry is not None
    layout = {"memory_format": torch.channels_last}
    (shape,) = size.weight_shapes
    x, codes = (value.contiguous(**layout) for value in _inputs(size))
    weight, bias = torch.randn(shape).to(size.dtype).contiguous(**layout), torch.zeros(shape[0], dtype=torch.float32)
    scale, integers = torch.ones(shape[0], dtype=torch.float32), _integers(size, shape)
    call = conv2d_call(integers, scale, bias, 1.0, 0, size.geometry, list(size.x_shape), size.dtype)
    narrow = bias.to(size.dtype)
    geometry = size.geometry

    def integer() -> None:
        if size.quantized_alone:
            x.to(torch.uint8)
        call(codes)

    return integer, lambda: aten.conv2d.default(x, weight, narrow, *geometry)


def _linear_runs(size: LayerSize) -> tuple[Callable[[], Any], Callable[[], Any]]:
    x, codes = _inputs(size)
    weights = [torch.randn(shape).to(size.dtype) for shape in size.weight_shapes]
    biases = [torch.zeros(shape[0], dtype=size.dtype) for shape in size.weight_shapes]
    outputs = sum(shape[0] for shape in size.weight_shapes)
    integers = _integers(size, (outputs, size.x_shape[-1]))
    call = linear_call(
        integers,
        torch.ones(outputs, dtype=torch.float32),
        torch.zeros(outputs, dtype=torch.float32),
        1.0,
        0,
        size.dtype,
    )

    def integer() -> None:
        if size.quantized_alone:
            x.to(torch.uint8)
        call(codes)

    def carrier() -> None:
        for weight, narrow in zip(weights, biases, strict=True):
            aten.linear.default(x, weight, narrow)

    return integer, carrier


def _integers(size: LayerSize, shape: tuple[int, ...]) -> Tensor:
    largest = 15 if size.weights == "int4" else 127
    return torch.randint(-largest, largest + 1, shape, dtype=torch.int8)


def _inputs(size: LayerSize) -> tuple[Tensor, Tensor]:
    x = torch.rand(size.x_shape).to(size.dtype)
    return x, torch.randint(0, 256, size.x_shape, dtype=torch.uint8)


def _units(graph_module: fx.GraphModule) -> Iterator[list[IntegerLayer]]:
    """Layers that are decided on together: a convolution, or linears that read the same codes."""
    for node in graph_module.graph.nodes:
        layer = integer_layer(node)
        if layer is not None and layer.is_conv2d and layer.x.target is qdiff.quantize.default:
            yield [layer]
    for group in sibling_linears(graph_module):
        if group[0].x.target is qdiff.quantize.default:
            yield group
