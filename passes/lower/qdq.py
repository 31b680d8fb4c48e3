"""Integer layers as the standard quantize/dequantize graph, for X86 inductor, ExecuTorch, OpenVINO and the like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.graph.edit import create_call, get_tensor, set_tensor, shape_of
from qdiff_fx.kernels import qdq as qdq  # registers the operators
from qdiff_fx.kernels.reference import integer_weight
from qdiff_fx.numerics.affine import along_axis
from qdiff_fx.passes.base import PassContext, RewritePass
from qdiff_fx.passes.lower.stored_weights import StoredWeightPass, computed_operands

aten = torch.ops.aten
qdiff = torch.ops.qdiff
decomposed = torch.ops.quantized_decomposed

_LAYERS: Mapping[Any, Any] = {qdiff.conv2d.default: aten.conv2d.default, qdiff.linear.default: aten.linear.default}


@dataclass(frozen=True, kw_only=True)
class QuantizedReaders:
    """A qdiff.quantize and the integer layers that read its codes."""

    quantize: fx.Node
    layers: tuple[fx.Node, ...]
    other: tuple[fx.Node, ...]


class QuantizeDequantizeLayers(RewritePass[QuantizedReaders]):
    """layer(quantize(x), packed W) becomes layer(dequantize(quantize_per_tensor(x)), dequantize_per_channel(int8 W)).

    Layers compute in float32, whatever the carrier, and their output is cast to it: codes times scales do not fit
    bfloat16. Weights are symmetric int8, 4-bit ones with zero points and shifts folded in. Consumers know activation
    scales per tensor only, so a vector inv_scale becomes a multiplication by 1 / m before the quantize step; its two
    roundings move about two codes in a million by one step, none where m is a power of two. One dequantize step a
    reader, which is what they match.

    Left alone: codes that anything but an integer layer reads, and layers whose constants are computed in the graph.
    """

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> QuantizedReaders | None:
        if node.target is not qdiff.quantize.default:
            return None
        layers: list[fx.Node] = []
        other: list[fx.Node] = []
        pending = list(node.users)
        while pending:
            user = pending.pop(0)
            if user.target is aten.unsqueeze.default:  # a conv1d, run as conv2d
                pending.extend(user.users)
            else:
                (layers if user.target in _LAYERS else other).append(user)
        return QuantizedReaders(quantize=node, layers=tuple(layers), other=tuple(other))

    def check(self, match: QuantizedReaders, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        if match.other:
            return f"{', '.join(node.name for node in match.other)}: reads the codes and is no integer layer"
        constants = [item for layer in match.layers for item in layer.args[1:6]] + [match.quantize.args[1]]
        return computed_operands([item for item in constants if isinstance(item, fx.Node)])

    def rewrite(self, match: QuantizedReaders, graph_module: fx.GraphModule, context: PassContext) -> None:
        graph, node = graph_module.graph, match.quantize
        arguments: Any = node.args
        x, inv_scale, zero_point, qmin, qmax, axis = arguments
        layer_arguments: Any = match.layers[0].args
        scale = layer_arguments[6]
        grid = (scale, zero_point, qmin, qmax, torch.uint8)
        with graph.inserting_before(node):
            if x.meta["val"].dtype != torch.float32:
                x = create_call(graph, aten.to.dtype, (x, torch.float32), like=node)
            if shape_of(inv_scale):
                reciprocals = _reciprocal_factors(get_tensor(graph_module, inv_scale.target).detach(), scale)
                value = along_axis(reciprocals, len(shape_of(x) or ()), axis)
                factor = _constant(graph_module, f"qdq_{node.name}_factor", value, like=node)
                x = create_call(graph, aten.mul.Tensor, (x, factor), like=node)
            codes = create_call(graph, decomposed.quantize_per_tensor.default, (x, *grid), like=node)
        node.replace_all_uses_with(codes)
        graph.erase_node(node)
        for layer in match.layers:
            _rewrite_layer(graph_module, layer, grid)


class QuantizeDequantizeWeights(StoredWeightPass):
    """qdiff.dequantize_weight becomes quantized_decomposed.dequantize_per_channel: the input stays in the carrier.

    Left alone: weights that are computed in the graph.
    """

    def rewrite(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> None:
        arguments: Any = match.args
        packed, scale, zero_point, shape, dtype = arguments
        graph = graph_module.graph
        with graph.inserting_before(match):
            weight = _dequantized(graph_module, match, (packed, scale, zero_point, None), shape, 1)
            if dtype != torch.float32:
                weight = create_call(graph, aten.to.dtype, (weight, dtype), like=match)
        match.replace_all_uses_with(weight)
        graph.erase_node(match)


def _reciprocal_factors(inv_scale: Tensor, scale: float) -> Tensor:
    """1 / m_c of inv_scale_c = 1 / (s_x m_c), a power of two exactly where m_c is one.

    There the rounding of 1 / s_x alone stands between the two, and multiplying must not round once more.
    """
    factors = inv_scale.double() * scale
    powers = torch.exp2(torch.log2(factors).round())
    return torch.where((factors / powers - 1.0).abs() < 2.0**-23, powers, factors).float()


def _rewrite_layer(graph_module: fx.GraphModule, layer: fx.Node, grid: tuple[Any, ...]) -> None:
    graph = graph_module.graph
    arguments: Any = layer.args
    codes, packed, scale, zero_point, shift, bias, _, _, shape, *geometry, dtype = arguments
    with graph.inserting_before(layer):
        x = create_call(graph, decomposed.dequantize_per_tensor.default, (codes, *grid), like=layer)
        groups = geometry[-1] if geometry else 1
        weight = _dequantized(graph_module, layer, (packed, scale, zero_point, shift), shape, groups)
        if bias is not None and bias.meta["val"].dtype != torch.float32:
            value = get_tensor(graph_module, bias.target).detach().to(torch.float32)
            bias = _constant(graph_module, f"qdq_{layer.name}_bias", value, like=layer)
        result = create_call(graph, _LAYERS[layer.target], (x, weight, bias, *geometry), like=layer)
        for key, value in layer.meta.items():
            if key != "val":
                result.meta.setdefault(key, value)
        if dtype != torch.float32:
            result = create_call(graph, aten.to.dtype, (result, dtype), like=layer)
    layer.replace_all_uses_with(result)
    graph.erase_node(layer)


def _dequantized(
    graph_module: fx.GraphModule, node: fx.Node, stored: tuple[Any, ...], shape: list[int], groups: int
) -> fx.Node:
    """dequantize_per_channel of the layer's weight as int8, at the graph's insertion point."""
    tensors: Any = [None if item is None else get_tensor(graph_module, item.target).detach() for item in stored]
    packed, scale, zero_point, shift = tensors
    weight = stored[0]
    if packed.dtype != torch.int8:
        value = integer_weight(packed, zero_point, shift, shape, groups)
        weight = _constant(graph_module, f"qdq_{node.name}_weight", value, like=node)
    zeros = _constant(
        graph_module, f"qdq_{node.name}_zero_point", torch.zeros_like(scale, dtype=torch.int64), like=node
    )
    arguments = (weight, stored[1], zeros, 0, -127, 127, torch.int8)
    return create_call(graph_module.graph, decomposed.dequantize_per_channel.default, arguments, like=node)


def _constant(graph_module: fx.GraphModule, name: str, tensor: Tensor, *, like: fx.Node) -> fx.Node:
    """A get_attr node of a new non-persistent buffer, at the graph's insertion point."""
    set_tensor(graph_module, name, tensor, persistent=False)
    node = graph_module.graph.get_attr(name)
    value = like.meta["val"]
    mode = getattr(value, "fake_mode", None)
    node.meta["val"] = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
    return node
