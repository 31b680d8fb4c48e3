"""Integer layers on the cuda backend's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.graph.edit import shape_of
from qdiff_fx.graph.meta import KERNEL
from qdiff_fx.graph.propagate import size_hint
from qdiff_fx.kernels.cuda_gpu import Gpu
from qdiff_fx.kernels.cuda_model import integer_layer, vendor_integer_layer
from qdiff_fx.kernels.cuda_tiles import Tile, interpreter_tile, ranked_tiles
from qdiff_fx.kernels.cuda_weights import (
    SIGNED_OFFSET,
    correction_table,
    kernel_packed_weight,
    kernel_shifts,
    kernel_weight,
)
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.lower.cuda_target import layer_work, target_gpu
from qdiff_fx.passes.lower.integer_layers import IntegerLayer, IntegerLayerPass, add_constant, stored_tensor
from qdiff_fx.passes.lower.signed_codes import signed_codes

qdiff = torch.ops.qdiff

NO_REQUANTIZE = [0, 0, 0]


class LowerCudaLayers(IntegerLayerPass):
    """qdiff.conv2d and qdiff.linear become qdiff.cuda_conv2d and qdiff.cuda_linear.

    Weights are reordered for the kernels, channels fastest; 4-bit ones stay packed. What the activation's zero point
    adds is folded into a table, s_x into the weights' scale. Block shapes and the kernel of a linear are those that
    `context.kernels` names, else those with the smallest predicted time for the sizes of calibration.

    Left alone: layers whose constants are computed in the graph.
    """

    def rewrite(self, match: IntegerLayer, graph_module: fx.GraphModule, context: PassContext) -> None:
        graph, layer = graph_module.graph, match.node
        gpu = target_gpu(graph_module)
        tensors = _constants(graph_module, match)
        kernel, tile = _chosen_kernel(match, gpu, context)
        with graph.inserting_before(layer):
            x = signed_codes(graph, match.x)
            nodes: dict[str, fx.Node | None] = {
                name: None if tensor is None else add_constant(graph_module, f"cuda_{layer.name}_{name}", tensor)
                for name, tensor in tensors.items()
            }
            constants = (
                *(nodes[name] for name in ("weight", "scale", "correction", "zero_point", "shift", "bias")),
                *(None, None, None),  # embedding, inv_scale, residual
            )
            tail: tuple[Any, ...]
            if match.is_conv2d:
                target = qdiff.cuda_conv2d.default
                tail = (match.weight_shape, *match.geometry, tile.arguments, match.output_dtype)
            else:
                target = qdiff.cuda_linear.default
                tail = (match.weight_shape, kernel, tile.arguments, match.output_dtype)
            node = graph.call_function(target, (x, *constants, NO_REQUANTIZE, False, *tail))
        node.meta = dict(layer.meta)
        name = str(target).removesuffix(".default")
        KERNEL.set(node, f"{name} {kernel if kernel == 'int_mm' else tile}")
        layer.replace_all_uses_with(node)
        graph.erase_node(layer)


def layer_kernels(layer: IntegerLayer, gpu: Gpu | None) -> dict[str, tuple[str, Tile]]:
    """Kernels that can run the layer, by the name that reports and timings have for them; the best predicted first.

    Each is the operators' `kernel` and `tile`. torch._int_mm takes int8 weights with multiples of 8 on both sides.
    """
    product = layer_work(layer).product
    tiles = [interpreter_tile(product)] if gpu is None else ranked_tiles(product, gpu)
    found = {str(tile): ("triton", tile) for tile in tiles}
    outputs, depth = layer.weight_shape[:2]
    if layer.is_conv2d or layer.weight_zero_point is not None or outputs % 8 or depth % 8:
        return found
    vendor = {"int_mm": ("int_mm", tiles[0])}
    work = layer_work(layer)
    faster = gpu is not None and vendor_integer_layer(work, gpu).predicted < integer_layer(work, gpu).predicted
    return {**vendor, **found} if faster else {**found, **vendor}


def _chosen_kernel(layer: IntegerLayer, gpu: Gpu | None, context: PassContext) -> tuple[str, Tile]:
    kernels = layer_kernels(layer, gpu)
    return kernels[context.kernels.get(layer.node.name, next(iter(kernels)))]


def _constants(graph_module: fx.GraphModule, layer: IntegerLayer) -> dict[str, Tensor | None]:
    stored = stored_tensor(graph_module, layer.weight)
    zero_point = stored_tensor(graph_module, layer.weight_zero_point)
    shift = stored_tensor(graph_module, layer.channel_shift)
    bias, weight_scale = stored_tensor(graph_module, layer.bias), stored_tensor(graph_module, layer.weight_scale)
    assert stored is not None and weight_scale is not None
    integers = layer.integers(graph_module)
    table = correction_table(integers, layer.x_zero_point - SIGNED_OFFSET, layer.padding, layer.dilation)
    if zero_point is None:
        weight = kernel_weight(stored)
    else:
        weight = kernel_packed_weight(stored, zero_point, layer.weight_shape)
    channels = size_hint((shape_of(layer.x) or ())[1 if layer.is_conv2d else -1])
    return {
        "weight": weight,
        "scale": weight_scale * layer.x_scale,
        "correction": table,
        "zero_point": None if zero_point is None else zero_point.to(torch.int8),
        "shift": None if shift is None else kernel_shifts(shift, channels, layer.groups),
        "bias": None if bias is None else bias.to(torch.float32),
    }
