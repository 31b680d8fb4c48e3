"""What lowerings of integer layers have in common, whatever kernels they go to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.graph.edit import create_call, get_tensor, set_tensor, shape_of
from qdiff_fx.kernels.reference import integer_weight
from qdiff_fx.passes.base import PassContext, RewritePass
from qdiff_fx.passes.lower.stored_weights import computed_operands
from qdiff_fx.passes.matcher import factors_of

aten = torch.ops.aten
qdiff = torch.ops.qdiff

CODES_AT_A_TIME = 2**18
"""Codes that are unpacked at once; each takes some 20 bytes on the way."""

_VIEWS = (
    aten.reshape.default,
    aten.view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.contiguous.default,
    aten.clone.default,
    aten.slice.Tensor,
    aten.to.dtype,
    aten.dropout.default,
)


@dataclass(frozen=True, kw_only=True)
class IntegerLayer:
    """A qdiff.conv2d or qdiff.linear by argument name; constants are nodes, None where it has none.

    Geometry of a linear is that of a 1x1 convolution.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    weight_scale: fx.Node
    weight_zero_point: fx.Node | None
    channel_shift: fx.Node | None
    bias: fx.Node | None
    x_scale: float
    x_zero_point: int
    weight_shape: list[int]
    output_dtype: torch.dtype
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @property
    def is_conv2d(self) -> bool:
        """Whether it is a convolution."""
        return self.node.target is qdiff.conv2d.default

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation and groups, as convolutions take them."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def integers(self, graph_module: fx.GraphModule) -> Tensor:
        """Its int8 weight [O, C / groups, ...], zero point and shifts folded."""
        packed, zero_point, shift = (
            stored_tensor(graph_module, item) for item in (self.weight, self.weight_zero_point, self.channel_shift)
        )
        assert packed is not None
        return folded_weight(packed, zero_point, shift, self.weight_shape, self.groups)


def folded_weight(
    packed: Tensor, zero_point: Tensor | None, shift: Tensor | None, shape: list[int], groups: int
) -> Tensor:
    """`reference.integer_weight`, without its wide intermediates of more than some rows of a large 4-bit weight."""
    outputs, elements = shape[0], prod(shape[1:])
    # Whole bytes: an even number of rows is an even number of codes.
    rows = max(2, CODES_AT_A_TIME // max(1, elements) // 2 * 2)
    if zero_point is None or groups != 1 or rows >= outputs:
        return integer_weight(packed, zero_point, shift, shape, groups)
    result = torch.empty(shape, dtype=torch.int8, device=packed.device)
    for start in range(0, outputs, rows):
        stop = min(start + rows, outputs)
        part = packed[start * elements // 2 : (stop * elements + 1) // 2]
        result[start:stop] = integer_weight(part, zero_point[start:stop], shift, [stop - start, *shape[1:]], groups)
    return result


class IntegerLayerPass(RewritePass[IntegerLayer]):
    """Finds every qdiff.conv2d and qdiff.linear; subclasses say what becomes of it.

    Left alone: layers whose constants are computed in the graph.
    """

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> IntegerLayer | None:
        return integer_layer(node)

    def check(self, match: IntegerLayer, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        return computed_operands(_constants(match.node))


def integer_layer(node: fx.Node) -> IntegerLayer | None:
    """`node` as an integer layer of the plan, or None."""
    if node.target not in (qdiff.conv2d.default, qdiff.linear.default):
        return None
    arguments: Any = node.args
    names = ("x", "weight", "weight_scale", "weight_zero_point", "channel_shift", "bias", "x_scale", "x_zero_point")
    *common, shape = arguments[:9]
    geometry: dict[str, Any] = {}
    if node.target is qdiff.conv2d.default:
        stride, padding, dilation, groups = arguments[9:13]
        geometry = {
            "stride": tuple(stride),
            "padding": tuple(padding),
            "dilation": tuple(dilation),
            "groups": groups,
        }
    return IntegerLayer(
        node=node,
        **dict(zip(names, common, strict=True)),
        weight_shape=list(shape),
        output_dtype=arguments[-1],
        **geometry,
    )


def sibling_linears(graph_module: fx.GraphModule) -> list[list[IntegerLayer]]:
    """The integer linears of the graph, those that read the same codes together."""
    groups: dict[Any, list[IntegerLayer]] = {}
    for node in graph_module.graph.nodes:
        layer = integer_layer(node)
        if layer is None or layer.is_conv2d or computed_operands(_constants(node)) is not None:
            continue
        key = (layer.x, layer.x_scale, layer.x_zero_point, layer.output_dtype)
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def replace_call(match: fx.Node, node: fx.Node) -> None:
    """Put `node`, whose fake value is known, in the place of `match`, cast to its type; `node` takes its metadata."""
    graph, value = match.graph, node.meta["val"]
    node.meta = {**match.meta, "val": value}
    result, dtype = node, match.meta["val"].dtype
    if value.dtype != dtype:
        with graph.inserting_before(match):
            result = create_call(graph, aten.to.dtype, (node, dtype), like=match)
    match.replace_all_uses_with(result)
    graph.erase_node(match)


def replace_by_slices(group: Sequence[IntegerLayer], call: fx.Node) -> list[fx.Node]:
    """Put slices of `call`, which has the outputs of all linears of the group in order, in their places; the slices.

    They are inserted at the graph's insertion point and cast where `call` has another dtype.
    """
    graph = call.graph
    parts, start = [], 0
    for layer in group:
        stop = start + layer.weight_shape[0]
        axis = len(shape_of(layer.node) or ()) - 1
        part = create_call(graph, aten.slice.Tensor, (call, axis, start, stop), like=layer.node)
        if call.meta["val"].dtype != layer.output_dtype:
            part = create_call(graph, aten.to.dtype, (part, layer.output_dtype), like=layer.node)
        for key, entry in layer.node.meta.items():
            part.meta.setdefault(key, entry)
        for user in layer.node.users:
            if user.target is aten.view.default:  # a slice has gaps, which a view cannot always step over
                user.target = aten.reshape.default
        layer.node.replace_all_uses_with(part)
        parts.append(part)
        start = stop
    for layer in group:  # the insertion point may be one of them
        graph.erase_node(layer.node)
    return parts


def _constants(layer: fx.Node) -> list[fx.Node]:
    return [item for item in layer.args[1:6] if isinstance(item, fx.Node)]


def stored_tensor(graph_module: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor that a get_attr node names, None for None."""
    return None if node is None else get_tensor(graph_module, node.target).detach()


def add_constant(graph_module: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    """A get_attr node of a new non-persistent buffer, without a fake value, at the graph's insertion point."""
    set_tensor(graph_module, name, tensor, persistent=False)
    return graph_module.graph.get_attr(name)


def value_like(node: fx.Node, tensor: Tensor) -> Tensor:
    """`tensor` as the values in `node`'s graph are: a fake of their mode, or itself."""
    mode = getattr(node.meta["val"], "fake_mode", None)
    value: Tensor = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
    return value


def quantized_alone(codes: fx.Node) -> bool:
    """Whether no compiler can put the quantize step into the kernel that writes its input."""
    node: Any = codes
    while node.target in (qdiff.quantize.default, *_VIEWS):
        node = node.args[0]
    opaque = (qdiff.attention.default, aten.scaled_dot_product_attention.default)
    layers = (qdiff.conv2d.default, qdiff.linear.default, aten.conv2d.default, aten.linear.default)
    return node.op == "placeholder" or node.target in (*opaque, *layers) or bool(factors_of(node))
