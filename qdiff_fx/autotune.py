"""Which layers run faster in the carrier type than on integers, found by timing both on the sizes of the example call.

Timed is what a step of the compiled network pays for the layer. On integers that is the kernel, and the quantize step
where no compiler can put it into the kernel that writes its input (behind another layer, an attention or the caller);
such a step stands in the timing as one pass from the carrier type to bytes. Steps that fuse cost nothing: the producer
writes a byte an element in place of the carrier type. Linears that read the same codes are timed as the one call that
they are merged into, against one call each in the carrier type. Layers that read codes through a view stay on integers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.graph.edit import shape_of
from qdiff_fx.graph.meta import TIMED, LayerTiming
from qdiff_fx.graph.propagate import size_hint
from qdiff_fx.kernels.x86 import OUTPUT_DTYPES, prepack_conv2d, prepack_linear
from qdiff_fx.passes.lower.integer_layers import IntegerLayer, integer_layer, quantized_alone
from qdiff_fx.passes.lower.x86_siblings import sibling_linears

aten = torch.ops.aten
qdiff = torch.ops.qdiff

Timings = Mapping[str, LayerTiming]
"""By the key of a `LayerSize`."""

MARGIN = 0.95
"""The carrier type must take at most so much of the integers' time: a tie keeps the smaller weight."""

_WARM_UP, _LEAST_RUNS, _MOST_RUNS, _SECONDS = 3, 9, 101, 0.05


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """What the time of a layer depends on; of linears that read the same codes, of all of them together.

    Args:
      x_shape: of the input in the example call.
      weight_shapes: one, or one a linear.
      geometry: stride, padding, dilation, groups of a convolution, None for linears.
      dtype: the carrier type.
      quantized_alone: whether the quantize step is a kernel of its own.
    """

    x_shape: tuple[int, ...]
    weight_shapes: tuple[tuple[int, ...], ...]
    geometry: tuple[list[int], list[int], list[int], int] | None
    dtype: torch.dtype
    quantized_alone: bool

    @property
    def key(self) -> str:
        """One line that two layers share if and only if they take the same time."""
        parts = ["linear" if self.geometry is None else "conv2d", _sizes(self.x_shape)]
        parts.append("+".join(_sizes(shape) for shape in self.weight_shapes))
        if self.geometry is not None:
            stride, padding, dilation, groups = self.geometry
            parts += [f"stride {_sizes(stride)}", f"padding {_sizes(padding)}", f"dilation {_sizes(dilation)}"]
            parts.append(f"groups {groups}")
        parts.append(str(self.dtype).removeprefix("torch."))
        return ", ".join([*parts, "quantized alone"] if self.quantized_alone else parts)


def choose_carrier_layers(
    graph_module: fx.GraphModule, timings: Timings, *, progress: bool | None = None
) -> tuple[dict[str, str], Timings]:
    """(nodes that are faster in the carrier type and why, timings with those that were missing).

    Layers are marked with their times for the lowering report. Equal sizes are timed once.

    Args:
      graph_module: the graph before its layers are lowered; quantize steps shared.
      timings: what is known of this machine.
    """
    units = [(unit, _size(unit)) for unit in _units(graph_module) if unit[0].output_dtype in OUTPUT_DTYPES]
    missing = {size.key: size for _, size in units if size.key not in timings}
    found = dict(timings)
    with progress_bar("autotune", total=len(missing), progress=progress) as bar:
        for key, size in missing.items():
            found[key] = measure(size)
            bar.update(1)
    chosen: dict[str, str] = {}
    for unit, size in units:
        timing = found[size.key]
        for layer in unit:
            TIMED.set(layer.node, timing)
            if timing.carrier < MARGIN * timing.integer:
                name = str(size.dtype).removeprefix("torch.")
                chosen[layer.node.name] = (
                    f"timed {timing.integer:.0f} us on integers, {timing.carrier:.0f} us in {name}"
                )
    return chosen, found


def measure(size: LayerSize) -> LayerTiming:
    """Medians of interleaved runs on random operands."""
    with torch.inference_mode():
        integer, carrier = (_linear_runs if size.geometry is None else _conv2d_runs)(size)
        times: tuple[list[float], list[float]] = ([], [])
        started = time.perf_counter()
        for turn in range(_WARM_UP + _MOST_RUNS):
            for run, seconds in zip((integer, carrier), times, strict=True):
                before = time.perf_counter()
                run()
                if turn >= _WARM_UP:
                    seconds.append(time.perf_counter() - before)
            if len(times[0]) >= _LEAST_RUNS and time.perf_counter() - started > _SECONDS:
                break
    return LayerTiming(integer=round(1e6 * median(times[0]), 2), carrier=round(1e6 * median(times[1]), 2))


def _conv2d_runs(size: LayerSize) -> tuple[Callable[[], Any], Callable[[], Any]]:
    assert size.geometry is not None
    layout = {"memory_format": torch.channels_last}
    (shape,) = size.weight_shapes
    x, codes = (value.contiguous(**layout) for value in _inputs(size))
    weight, bias = torch.randn(shape).to(size.dtype).contiguous(**layout), torch.zeros(shape[0])
    scale, integers = torch.ones(shape[0]), torch.randint(-127, 128, shape, dtype=torch.int8)
    packed = prepack_conv2d(integers, scale, *size.geometry, list(size.x_shape))
    tail = (list(shape), *size.geometry, size.dtype)
    narrow = bias.to(size.dtype)
    geometry = size.geometry

    def integer() -> None:
        if size.quantized_alone:
            x.to(torch.uint8)
        qdiff.x86_conv2d.default(codes, packed, scale, bias, 1.0, 0, *tail)

    return integer, lambda: aten.conv2d.default(x, weight, narrow, *geometry)


def _linear_runs(size: LayerSize) -> tuple[Callable[[], Any], Callable[[], Any]]:
    x, codes = _inputs(size)
    weights = [torch.randn(shape).to(size.dtype) for shape in size.weight_shapes]
    biases = [torch.zeros(shape[0], dtype=size.dtype) for shape in size.weight_shapes]
    outputs = sum(shape[0] for shape in size.weight_shapes)
    packed = prepack_linear(torch.randint(-127, 128, (outputs, size.x_shape[-1]), dtype=torch.int8))
    scale, bias = torch.ones(outputs), torch.zeros(outputs)

    def integer() -> None:
        if size.quantized_alone:
            x.to(torch.uint8)
        qdiff.x86_linear.default(codes, packed, scale, bias, 1.0, 0, outputs, size.dtype)

    def carrier() -> None:
        for weight, narrow in zip(weights, biases, strict=True):
            aten.linear.default(x, weight, narrow)

    return integer, carrier


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


def _size(unit: list[IntegerLayer]) -> LayerSize:
    first = unit[0]
    return LayerSize(
        x_shape=tuple(size_hint(size) for size in shape_of(first.x) or ()),
        weight_shapes=tuple(tuple(layer.weight_shape) for layer in unit),
        geometry=first.geometry if first.is_conv2d else None,
        dtype=first.output_dtype,
        quantized_alone=quantized_alone(first.x),
    )


def _sizes(values: Any) -> str:
    return "x".join(str(value) for value in values)
