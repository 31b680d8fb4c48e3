"""Small edits that keep metadata: new calls, new tensors, layer calls by argument name."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qdiff_fx.graph.meta import BLOCK, MODULE_PATH

aten = torch.ops.aten

LAYER_OPERATORS: Mapping[Any, str] = {
    aten.conv1d.default: "conv1d",
    aten.conv1d.padding: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv2d.padding: "conv2d",
    aten.linear.default: "linear",
}

RANGE_KEEPING = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.avg_pool2d.default,
    aten.max_pool2d.default,
)
"""Operators whose output channel c holds values of input channel c, in its range, at the same axis."""


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """A conv or linear node by argument name. Strides and the like are as written, int or list."""

    node: fx.Node
    operator: str
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    @property
    def channel_axis(self) -> int:
        """Where the input's channels lie."""
        return -1 if self.operator == "linear" else 1

    @property
    def weight_source(self) -> fx.Node:
        """The full-precision weight, behind its quantizer."""
        source = _source(self.weight)
        assert source is not None
        return source

    @property
    def bias_source(self) -> fx.Node | None:
        """The full-precision bias, behind its correction; None where there is none."""
        return None if self.bias is None else _source(self.bias)


def _source(node: fx.Node) -> fx.Node | None:
    if node.op != "call_module":
        return node
    source = node.args[0] if node.args else None
    assert source is None or isinstance(source, fx.Node)
    return source


def layer_call(node: fx.Node) -> LayerCall | None:
    """`node` as a layer call, or None if it is no conv or linear."""
    name = LAYER_OPERATORS.get(node.target) if node.op == "call_function" else None
    if name is None:
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    arguments: dict[str, Any] = {"bias": None, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    return LayerCall(node=node, operator=name, **arguments)


def set_bias(node: fx.Node, bias: fx.Node | None) -> None:
    """Give a conv or linear node another bias."""
    if "bias" in node.kwargs:
        node.update_kwarg("bias", bias)
    else:
        node.args = (*node.args[:2], bias, *node.args[3:])


def create_call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    like: fx.Node,
) -> fx.Node:
    """A new call at the graph's insertion point, with the provenance of `like` and a propagated fake value."""
    node = graph.call_function(target, tuple(args), dict(kwargs or {}))
    copy_provenance(like, node)
    value = lambda item: item.meta.get("val")  # noqa: E731
    node.meta["val"] = target(*fx.map_arg(tuple(args), value), **fx.map_arg(dict(kwargs or {}), value))
    return node


def copy_provenance(source: fx.Node, node: fx.Node) -> None:
    """Give `node` the module path, block and stack of `source`."""
    for key in ("nn_module_stack", "stack_trace", MODULE_PATH.name, BLOCK.name):
        if key in source.meta:
            node.meta[key] = source.meta[key]


def get_tensor(graph_module: nn.Module, target: Any) -> Tensor:
    """The parameter or buffer that a get_attr node names."""
    value: Tensor = operator.attrgetter(str(target))(graph_module)
    return value


def set_tensor(graph_module: nn.Module, target: str, value: Tensor, *, persistent: bool = True) -> None:
    """Store `value` under a dotted name: parameters stay parameters, other tensors become buffers."""
    parent: nn.Module = graph_module
    *path, name = target.split(".")
    for item in path:
        child = getattr(parent, item, None)
        if child is None:
            child = nn.Module()
            parent.add_module(item, child)
        parent = child
    if hasattr(parent, name):
        delattr(parent, name)
    if isinstance(value, nn.Parameter):
        parent.register_parameter(name, value)
    else:
        parent.register_buffer(name, value, persistent=persistent)


def tensor_device(graph_module: fx.GraphModule) -> torch.device:
    """Where the graph's constants are; the CPU where it has none."""
    named = next((node for node in graph_module.graph.nodes if node.op == "get_attr"), None)
    return torch.device("cpu") if named is None else get_tensor(graph_module, named.target).device


def delete_tensor(graph_module: nn.Module, target: Any) -> None:
    """Take the parameter or buffer of this dotted name out of its module."""
    path, _, name = str(target).rpartition(".")
    delattr(graph_module.get_submodule(path), name)


def add_module(graph_module: fx.GraphModule, name: str, module: nn.Module) -> str:
    """Register `module` under a free name made from `name`; returns the name."""
    candidate, count = name, 1
    while hasattr(graph_module, candidate):
        candidate, count = f"{name}_{count}", count + 1
    graph_module.add_module(candidate, module)
    return candidate


def shape_of(node: fx.Node) -> tuple[Any, ...] | None:
    """Shape of a node's fake value; dynamic sizes are SymInt. None if it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def ancestors(graph: fx.Graph) -> dict[fx.Node, int]:
    """For every node, what it is computed from, itself included, as a bit mask over execution order.

    Only activations count: weights and sizes that two tensors share relate them no closer.
    """
    masks: dict[fx.Node, int] = {}
    for index, node in enumerate(graph.nodes):
        counts = node.op != "get_attr" and isinstance(node.meta.get("val"), (Tensor, list, tuple))
        mask = 1 << index if counts else 0
        for item in node.all_input_nodes if counts else ():
            mask |= masks[item]
        masks[node] = mask
    return masks


def pruned(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule over the same graph that owns nothing but the tensors and modules its nodes name."""
    owned: dict[str, Any] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            owned[str(node.target)] = get_tensor(graph_module, node.target)
        elif node.op == "call_module":
            owned[str(node.target)] = graph_module.get_submodule(str(node.target))
    result = fx.GraphModule(owned, graph_module.graph, class_name=type(graph_module).__name__)
    return result.train(graph_module.training)


def shared_copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with a graph of its own and the same tensors and modules; a deepcopy would double them."""
    result = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph), class_name=type(graph_module).__name__)
    return result.train(graph_module.training)


def freeze_parameters(graph_module: fx.GraphModule) -> None:
    """Swap every parameter for one that shares its storage and takes no gradient; other holders keep their own."""
    for name, parameter in list(graph_module.named_parameters(remove_duplicate=False)):
        set_tensor(graph_module, name, nn.Parameter(parameter.detach(), requires_grad=False))


def stored_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of `tensors` as stored, shared storage counted each time it is named."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
