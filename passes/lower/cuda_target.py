"""Which GPU a graph is lowered for, and how large its layers are."""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from qdiff_fx.graph.edit import shape_of, tensor_device
from qdiff_fx.graph.propagate import size_hint
from qdiff_fx.kernels.cuda_gpu import GPUS, Gpu, gpu_for
from qdiff_fx.kernels.cuda_model import LayerWork
from qdiff_fx.kernels.cuda_tiles import Product
from qdiff_fx.passes.lower.integer_layers import IntegerLayer, quantized_alone

DEFAULT_CAPABILITY = (9, 0)
"""Assumed for tensors on no real device: graphs that are only traced."""


def target_gpu(graph_module: fx.GraphModule) -> Gpu | None:
    """The GPU that the graph's tensors are on; None on the CPU, where Triton's interpreter stands in."""
    device = tensor_device(graph_module)
    if device.type == "cpu":
        return None
    if device.type == "cuda" and torch.cuda.is_available():
        return gpu_for(torch.cuda.get_device_capability(device))
    return GPUS[DEFAULT_CAPABILITY]


def layer_work(layer: IntegerLayer) -> LayerWork:
    """The layer's size in calibration."""
    sizes = [size_hint(size) for size in shape_of(layer.node) or ()]
    outputs, depth, *kernel = layer.weight_shape
    rows = prod(sizes) // outputs
    product = Product(
        rows=rows,
        outputs=outputs // layer.groups,
        depth=depth,
        taps=prod(kernel),
        groups=layer.groups,
        packed=layer.weight_zero_point is not None,
        stride_one=set(layer.stride) == {1},
    )
    elements = prod(size_hint(size) for size in shape_of(layer.x) or ())
    return LayerWork(product=product, input_elements=elements, quantized_alone=quantized_alone(layer.x))
