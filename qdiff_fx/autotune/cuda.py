"""Which kernel and block shape every layer and attention of a network runs fastest with on this GPU.

A layer's integer kernels are timed against each other and against the vendor's kernel in the carrier type, an attention
against scaled_dot_product_attention. Kernels follow each other without launches between them, as compiled networks
replay them (`timer.gpu_kernel_seconds`). Weights are read from memory, because in a step those of other layers lie
between two uses; activations may come from the cache, because they were just written. A quantize step that no compiler
can put into the kernel before it stands in the timing as one pass from the carrier type to bytes; for an attention,
whose q, k and v are written by layers, that is three. Layers that read codes through a view stay on integers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from math import ceil
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.autotune.attention_size import AttentionSize, attention_size
from qdiff_fx.autotune.choose import MARGIN, Subject
from qdiff_fx.autotune.layer_size import LayerSize, layer_size
from qdiff_fx.autotune.timer import CALLS, Run, gpu_kernel_seconds, interleaved, processor_seconds
from qdiff_fx.errors import BackendError
from qdiff_fx.graph.edit import tensor_device
from qdiff_fx.graph.meta import LayerTiming
from qdiff_fx.kernels.cuda_gpu import Gpu
from qdiff_fx.kernels.cuda_tiles import AttentionTile, Tile
from qdiff_fx.kernels.cuda_weights import border_limit
from qdiff_fx.passes.lower.cuda_attention import attention_kernels, has_kernel
from qdiff_fx.passes.lower.cuda_layers import NO_REQUANTIZE, layer_kernels
from qdiff_fx.passes.lower.cuda_target import target_gpu
from qdiff_fx.passes.lower.integer_layers import IntegerLayer, integer_layer
from qdiff_fx.passes.lower.stored_weights import computed_operands

aten = torch.ops.aten
qdiff = torch.ops.qdiff
logger = logging.getLogger(__name__)


def subjects(graph_module: fx.GraphModule) -> Iterator[Subject]:
    """Every layer and attention that has an integer kernel."""
    gpu, device = target_gpu(graph_module), tensor_device(graph_module)
    for node in graph_module.graph.nodes:
        layer = integer_layer(node)
        if layer is not None:
            if computed_operands([item for item in node.args[1:6] if isinstance(item, fx.Node)]) is None:
                yield _layer(layer, gpu, device)
        elif node.target is qdiff.attention.default and has_kernel(node):
            yield _attention(node, gpu, device)


def _layer(layer: IntegerLayer, gpu: Gpu | None, device: torch.device) -> Subject:
    weights = "int8" if layer.weight_zero_point is None else "int4"
    size = layer_size([layer], weights=weights if layer.channel_shift is None else f"{weights} with shifts")
    kernels = layer_kernels(layer, gpu)
    return Subject(
        nodes=(layer.node,),
        key=size.key,
        dtype=size.dtype,
        measure=lambda: measure_layer(size, kernels, device),
        kernels=tuple(kernels),
        margin=MARGIN if layer.x.target is qdiff.quantize.default else None,
    )


def _attention(node: fx.Node, gpu: Gpu | None, device: torch.device) -> Subject:
    size, kernels = attention_size(node), attention_kernels(node, gpu)
    return Subject(
        nodes=(node,),
        key=size.key,
        dtype=size.dtype,
        measure=lambda: measure_attention(size, kernels, device),
        kernels=tuple(kernels),
        margin=1.0,  # a tie goes to the exact one: there is no weight to keep small
    )


def measure_layer(
    size: LayerSize, kernels: Mapping[str, tuple[str, Tile]], device: torch.device, clock: Any = None
) -> LayerTiming:
    """The layer's times on random operands; `clock` takes runs to their seconds, None is the device's own."""
    with torch.inference_mode():
        return _fastest(size.key, *layer_runs(size, kernels, device), clock or device_clock(device))


def measure_attention(
    size: AttentionSize, kernels: Mapping[str, AttentionTile], device: torch.device, clock: Any = None
) -> LayerTiming:
    """The attention's times on random operands; `clock` as for a layer."""
    with torch.inference_mode():
        return _fastest(size.key, *_attention_runs(size, kernels, device), clock or device_clock(device))


def device_clock(device: torch.device) -> Callable[[Sequence[Run]], list[float]]:
    """Median seconds of runs on `device`; on the CPU, one run of each: the interpreter's times mean nothing."""
    if device.type == "cuda":
        return gpu_kernel_seconds
    return lambda runs: interleaved(runs, processor_seconds, warm_up=0, least=1, most=1)


def _fastest(
    key: str, integer: Mapping[str, Run], carrier: Run, clock: Callable[[Sequence[Run]], list[float]]
) -> LayerTiming:
    usable = {name: run for name, run in integer.items() if _fits(name, run)}
    if not usable:
        raise BackendError(f"{key}: none of {', '.join(integer)} fits this GPU; use autotune=False")
    *times, other = clock([*usable.values(), carrier])
    seconds, kernel = min(zip(times, usable, strict=True))
    return LayerTiming(integer=_microseconds(seconds), carrier=_microseconds(other), kernel=kernel)


def _fits(name: str, run: Run) -> bool:
    """Whether the GPU has the shared memory and registers for a kernel; compiles it."""
    from qdiff_fx.kernels.triton_kernels.launch import OutOfResources

    try:
        run()
    except OutOfResources as error:
        logger.warning("kernel %s is left out: %s", name, error)
        return False
    return True


def _microseconds(seconds: float) -> float:
    return max(0.01, round(1e6 * seconds, 2))


def layer_runs(
    size: LayerSize, kernels: Mapping[str, tuple[str, Tile]], device: torch.device
) -> tuple[dict[str, Run], Run]:
    """Calls of a layer on random operands, to be timed: one by each of the kernels, and one in the carrier type."""
    return (_linear_runs if size.geometry is None else _conv2d_runs)(size, kernels, device)


def _conv2d_runs(
    size: LayerSize, kernels: Mapping[str, tuple[str, Tile]], device: torch.device
) -> tuple[dict[str, Run], Run]:
    assert size.geometry is not None
    layout = {"memory_format": torch.channels_last}
    (shape,) = size.weight_shapes
    stride, padding, dilation, groups = size.geometry
    patterns = border_limit(padding[0], dilation[0]) ** 2 * border_limit(padding[1], dilation[1]) ** 2
    x, codes = (value.contiguous(**layout) for value in _inputs(size, device))
    weights, constants = _constants(size, patterns, groups, device)
    floats = _copies(lambda: torch.randn(shape, device=device).to(size.dtype).contiguous(**layout), device)
    bias = torch.zeros(shape[0], dtype=size.dtype, device=device)

    def run(tile: Tile) -> None:
        if size.quantized_alone:
            x.to(torch.int8)
        tail = (NO_REQUANTIZE, False, list(shape), stride, padding, dilation, groups, tile.arguments, size.dtype)
        qdiff.cuda_conv2d.default(codes, next(weights), *constants, *tail)

    integer = {name: _bound(run, tile) for name, (_, tile) in kernels.items()}
    return integer, lambda: aten.conv2d.default(x, next(floats), bias, stride, padding, dilation, groups)


def _linear_runs(
    size: LayerSize, kernels: Mapping[str, tuple[str, Tile]], device: torch.device
) -> tuple[dict[str, Run], Run]:
    (shape,) = size.weight_shapes
    x, codes = _inputs(size, device)
    weights, constants = _constants(size, 1, 1, device)
    floats = _copies(lambda: torch.randn(shape, device=device).to(size.dtype), device)
    bias = torch.zeros(shape[0], dtype=size.dtype, device=device)

    def run(kernel: str, tile: Tile) -> None:
        if size.quantized_alone:
            x.to(torch.int8)
        tail = (NO_REQUANTIZE, False, list(shape), kernel, tile.arguments, size.dtype)
        qdiff.cuda_linear.default(codes, next(weights), *constants, *tail)

    integer = {name: _bound(run, *choice) for name, choice in kernels.items()}
    return integer, lambda: aten.linear.default(x, next(floats), bias)


def _attention_runs(
    size: AttentionSize, kernels: Mapping[str, AttentionTile], device: torch.device
) -> tuple[dict[str, Run], Run]:
    operands = [torch.randn(shape, device=device).to(size.dtype) for shape in size.shapes]
    codes = [torch.randint(-128, 128, shape, dtype=torch.int8, device=device) for shape in size.shapes]
    mask = None
    if size.mask is not None:
        mask_shape, mask_dtype = size.mask
        mask = torch.ones(mask_shape, dtype=mask_dtype, device=device)

    def run(tile: AttentionTile) -> None:
        for operand in operands:
            operand.to(torch.int8)
        numbers = (size.is_causal, 1e-4, 1e-2, [0, 0, 0], 255, tile.arguments, size.dtype)
        qdiff.cuda_attention.default(*codes, mask, *numbers)

    integer = {name: _bound(run, tile) for name, tile in kernels.items()}
    return integer, lambda: aten.scaled_dot_product_attention.default(*operands, mask, 0.0, size.is_causal)


def _bound(run: Callable[..., None], *arguments: Any) -> Run:
    return lambda: run(*arguments)


def _inputs(size: LayerSize, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.rand(size.x_shape, device=device).to(size.dtype)
    return x, torch.randint(-128, 128, size.x_shape, dtype=torch.int8, device=device)


def _constants(
    size: LayerSize, patterns: int, groups: int, device: torch.device
) -> tuple[Iterator[Tensor], tuple[Tensor | None, ...]]:
    """Weights as the kernels read them, over and over, and the operators' other tensors, in order."""
    ((outputs, depth, *kernel),) = size.weight_shapes
    taps = kernel[0] * kernel[1] if kernel else 1
    packed = size.weights != "int8"
    length = taps * (ceil(depth / 2) if packed else depth)

    def integers(*shape: int, low: int = -127, high: int = 128) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.int8, device=device)

    shifts = integers(groups * 2 * ceil(depth / 2), low=0, high=4) if "shifts" in size.weights else None
    constants = (
        torch.full((outputs,), 1e-6, dtype=torch.float32, device=device),
        torch.zeros(patterns, outputs, dtype=torch.int32, device=device),
        integers(outputs, low=0, high=16) if packed else None,
        shifts,
        torch.zeros(outputs, dtype=torch.float32, device=device),
        *(None, None, None),  # embedding, inv_scale, residual
    )
    return _copies(lambda: integers(outputs, length), device), constants


def _copies(make: Callable[[], Tensor], device: torch.device) -> Iterator[Tensor]:
    """Tensors over and over, together larger than the GPU's cache, so that each comes from memory."""
    first = make()
    count = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(CALLS, ceil(2 * cache / first.nbytes))
    return cycle([first, *(make() for _ in range(count - 1))])
