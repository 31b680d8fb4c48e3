"""Layers behind quantizers become integer layers with packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.errors import PatternError
from qdiff_fx.fake_quantize import ActivationQuantizer, WeightQuantizer
from qdiff_fx.graph.edit import LayerCall, create_call, delete_tensor, get_tensor, layer_call, set_tensor
from qdiff_fx.graph.meta import LAYER
from qdiff_fx.kernels.reference import PACKED_BITS
from qdiff_fx.numerics.affine import reciprocal
from qdiff_fx.numerics.packing import pack_int4, pack_shifts
from qdiff_fx.numerics.weights import fold_codes
from qdiff_fx.passes.base import PassContext, RewritePass

aten = torch.ops.aten
qdiff = torch.ops.qdiff


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """A layer whose weight, and perhaps whose input, comes through a quantizer."""

    layer: LayerCall
    weight_source: fx.Node
    weight_quantizer: WeightQuantizer
    input_source: fx.Node
    input_quantizer: ActivationQuantizer | None


class ConvertLayers(RewritePass[QuantizedLayer]):
    """conv/linear(fake_quantize(x), fake_quantize(W), b) becomes qdiff.conv2d/linear(qdiff.quantize(x), packed W, b).

    A layer whose input stays in the carrier type keeps its ATen operator and reads qdiff.dequantize_weight. A tensor
    that several layers read is quantized once. conv1d runs as a 1 x k conv2d. The floating weight leaves the module.

    Left alone: layers without a weight quantizer.
    """

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> QuantizedLayer | None:
        layer = layer_call(node)
        if layer is None or layer.weight.op != "call_module":
            return None
        weight_quantizer = graph_module.get_submodule(str(layer.weight.target))
        if not isinstance(weight_quantizer, WeightQuantizer):
            return None
        source, quantizer = layer.input, None
        if source.op == "call_module":
            module = graph_module.get_submodule(str(source.target))
            if isinstance(module, ActivationQuantizer):
                quantizer = module
                assert isinstance(source.args[0], fx.Node)
                source = source.args[0]
        return QuantizedLayer(
            layer=layer,
            weight_source=layer.weight_source,
            weight_quantizer=weight_quantizer,
            input_source=source,
            input_quantizer=quantizer,
        )

    def rewrite(self, match: QuantizedLayer, graph_module: fx.GraphModule, context: PassContext) -> None:
        graph, layer, node = graph_module.graph, match.layer, match.layer.node
        is_conv1d = layer.operator == "conv1d"
        stored = _store_weight(graph_module, match, as_conv2d=is_conv1d and match.input_quantizer is not None)
        dtype = _carrier(node)
        _require_one_factor(match)
        if match.input_quantizer is None:
            with graph.inserting_before(node):
                operands = (stored.weight, stored.scale, stored.zero_point, stored.shape, dtype)
                weight = create_call(graph, qdiff.dequantize_weight.default, operands, like=node)
            node.update_arg(1, weight)
            _release(graph_module, match)
            return
        codes = _quantized_input(graph_module, layer, match.input_quantizer)
        with graph.inserting_before(node):
            if is_conv1d:
                codes = create_call(graph, aten.unsqueeze.default, (codes, 2), like=node)
            common = (codes, stored.weight, stored.scale, stored.zero_point, stored.shift, layer.bias)
            x_scale, x_zero_point = float(match.input_quantizer.scale), int(match.input_quantizer.zero_point)
            args: tuple[Any, ...]
            if layer.operator == "linear":
                args = (*common, x_scale, x_zero_point, stored.shape, dtype)
                result = create_call(graph, qdiff.linear.default, args, like=node)
            else:
                stride, padding, dilation = _geometry(layer, stored.shape)
                args = (*common, x_scale, x_zero_point, stored.shape, stride, padding, dilation, layer.groups, dtype)
                result = create_call(graph, qdiff.conv2d.default, args, like=node)
            LAYER.set(result, LAYER.require(node))
            if is_conv1d:
                result = create_call(graph, aten.squeeze.dim, (result, 2), like=node)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        _release(graph_module, match)


def _require_one_factor(match: QuantizedLayer) -> None:
    """What the weight is multiplied by is what the input is divided by, or the layer computes something else."""
    weight, source = match.weight_quantizer, match.input_quantizer
    if source is None:
        if weight.channel_factor is not None or weight.channel_shift is not None:
            raise PatternError(
                f"{weight.name}: its weight has channel factors, its input has no quantizer to fold their inverse "
                f"into; drop the factors and fit the weight again"
            )
        return
    ours, theirs = weight.channel_factor, source.channel_factor
    if (ours is None) != (theirs is None) or (
        ours is not None and theirs is not None and not torch.equal(ours, theirs.to(ours.device))
    ):
        raise PatternError(
            f"{weight.name}: its weight's channel factors are not those of {source.name}, its input; fit both again"
        )


@dataclass(frozen=True, kw_only=True)
class _StoredWeight:
    """Nodes of a weight in its stored form; None where it has no such part."""

    weight: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None
    shift: fx.Node | None
    shape: list[int]


def _release(graph_module: fx.GraphModule, match: QuantizedLayer) -> None:
    """Drop the floating weight at once if nothing reads it any more: a large model has no room for both forms."""
    call, source = match.layer.weight, match.weight_source
    if not call.users:
        graph_module.graph.erase_node(call)
        if not source.users and source.op == "get_attr":
            graph_module.graph.erase_node(source)
            if all(node.target != source.target for node in graph_module.graph.find_nodes(op="get_attr")):
                delete_tensor(graph_module, source.target)


def _store_weight(graph_module: fx.GraphModule, match: QuantizedLayer, *, as_conv2d: bool) -> _StoredWeight:
    """Round and pack the weight under its own name; what another layer stored already is reused."""
    quantizer, name = match.weight_quantizer, str(match.weight_source.target)
    weight = get_tensor(graph_module, name)
    codes = quantizer.codes(weight)
    if as_conv2d:
        codes = codes.unsqueeze(2)
    tensors: dict[str, Tensor] = {"scale": quantizer.scale.expand(codes.shape[0]).clone()}
    if quantizer.spec.bits <= PACKED_BITS:
        tensors["packed"] = pack_int4(codes.contiguous())
        tensors["zero_point"] = quantizer.zero_point.expand(codes.shape[0]).to(torch.uint8).contiguous()
        if quantizer.channel_shift is not None:
            tensors["shift"] = pack_shifts(quantizer.channel_shift)
    else:
        tensors["packed"] = fold_codes(codes, quantizer.zero_point, quantizer.channel_shift, groups=quantizer.groups)
    name = _stored_name(graph_module, name, tensors)
    nodes: dict[str, fx.Node] = {}
    with graph_module.graph.inserting_before(match.layer.node):
        for kind, tensor in tensors.items():
            set_tensor(graph_module, f"{name}_{kind}", tensor)
            nodes[kind] = graph_module.graph.get_attr(f"{name}_{kind}")
            nodes[kind].meta["val"] = _fake_like(match.layer.node, tensor)
    return _StoredWeight(
        weight=nodes["packed"],
        scale=nodes["scale"],
        zero_point=nodes.get("zero_point"),
        shift=nodes.get("shift"),
        shape=list(codes.shape),
    )


def _stored_name(graph_module: fx.GraphModule, name: str, tensors: Mapping[str, Tensor]) -> str:
    """`name`, or a numbered one where it holds the same weight in another form: W8 at a boundary, W4 inside."""
    candidate, count = name, 1
    while any(
        (stored := _stored_tensor(graph_module, f"{candidate}_{kind}")) is not None and not torch.equal(stored, tensor)
        for kind, tensor in tensors.items()
    ):
        candidate, count = f"{name}_{count}", count + 1
    return candidate


def _stored_tensor(graph_module: fx.GraphModule, target: str) -> Tensor | None:
    try:
        return get_tensor(graph_module, target)
    except AttributeError:
        return None


def _quantized_input(graph_module: fx.GraphModule, layer: LayerCall, quantizer: ActivationQuantizer) -> fx.Node:
    """The qdiff.quantize node that replaces the quantizer's call; made once, beside that call."""
    call = layer.input
    for user in call.args[0].users:  # type: ignore[union-attr]
        if user.target is qdiff.quantize.default and user.meta.get("qdiff_quantizer") == call.target:
            return user
    step = quantizer.scale if quantizer.channel_factor is None else quantizer.scale * quantizer.channel_factor
    name = f"{call.target}_inv_scale"
    set_tensor(graph_module, name, reciprocal(step).detach().clone())
    rank = len(call.meta["val"].shape)
    graph = graph_module.graph
    with graph.inserting_before(call):
        inv_scale = graph.get_attr(name)
        inv_scale.meta["val"] = _fake_like(call, get_tensor(graph_module, name))
        spec = quantizer.spec
        args = (call.args[0], inv_scale, int(quantizer.zero_point), spec.qmin, spec.qmax, quantizer.channel_axis % rank)
        node = create_call(graph, qdiff.quantize.default, args, like=call)
    node.meta["qdiff_quantizer"] = call.target
    return node


def _geometry(layer: LayerCall, weight_shape: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation as pairs; a conv1d's become those of a 1 x k kernel."""
    one_dimensional = layer.operator == "conv1d"

    def pair(value: Any, neutral: int) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        if one_dimensional:
            return [neutral, values[0]]
        return values * 2 if len(values) == 1 else values

    dilation = pair(layer.dilation, 1)
    if isinstance(layer.padding, str):
        kernel = weight_shape[2:]
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [0, 0] if layer.padding == "valid" else [size // 2 for size in total]
    else:
        padding = pair(layer.padding, 0)
    return pair(layer.stride, 1), padding, dilation


def _carrier(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _fake_like(node: fx.Node, tensor: Tensor) -> Tensor:
    """`tensor` as a fake of the graph's own fake mode."""
    value = node.meta["val"]
    return value.fake_mode.from_tensor(tensor, static_shapes=True) if hasattr(value, "fake_mode") else tensor.to("meta")
