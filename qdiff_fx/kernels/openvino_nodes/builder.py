"""The walk over an fx graph that makes an OpenVINO model of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import openvino as ov
import torch
from openvino import opset15 as opset
from torch import Tensor, fx

from qdiff_fx.errors import BackendError
from qdiff_fx.graph.edit import get_tensor
from qdiff_fx.kernels.openvino_nodes.attention import ATTENTION
from qdiff_fx.kernels.openvino_nodes.elementwise import ELEMENTWISE
from qdiff_fx.kernels.openvino_nodes.layers import LAYERS, Codes, unsqueezed
from qdiff_fx.kernels.openvino_nodes.shapes import SHAPES
from qdiff_fx.kernels.openvino_nodes.values import Call, Stored, element_type, is_static, output

aten = torch.ops.aten

OPERATORS: Mapping[Any, Callable[..., Any]] = {**ELEMENTWISE, **SHAPES, **LAYERS, **ATTENTION}
"""Every operator that has a form in OpenVINO here."""


def build_model(graph_module: fx.GraphModule) -> Any:
    """`graph_module` as an `openvino.Model` of the same inputs and outputs, floating ones in float32.

    Sizes that are symbols in the nodes' fake values are dynamic; convolutions, linears and attentions are named like
    their fx nodes.

    Raises: BackendError naming the first node whose operator has no form here.
    """
    unknown = [node for node in graph_module.graph.nodes if not _is_known(node)]
    if unknown:
        raise BackendError(
            f"{unknown[0].name}: operator {unknown[0].target} has no form in OpenVINO here; "
            "use backend='x86' or backend='reference'"
        )
    values: dict[fx.Node, Any] = {}
    parameters: list[Any] = []
    results: list[Any] = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            parameters.append(_parameter(node))
            values[node] = parameters[-1].output(0)
        elif node.op == "get_attr":
            values[node] = Stored(tensor=get_tensor(graph_module, node.target))
        elif node.op == "output":
            outputs = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
            results = [opset.result(_real(values[item])) for item in outputs]
        else:
            _emit(node, values)
    return ov.Model(results, parameters, type(graph_module).__name__)


def _is_known(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr", "output") or node.target in OPERATORS


def _emit(node: fx.Node, values: dict[fx.Node, Any]) -> None:
    value = node.meta.get("val")
    if isinstance(value, (int, float)) and not isinstance(value, bool):  # a size that no call changes
        values[node] = value
        return
    target: Any = node.target
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: values[item])
    if target is aten.unsqueeze.default and isinstance(args[0], Codes):
        values[node] = unsqueezed(args[0], args[1])
        return
    try:
        values[node] = OPERATORS[target](Call(node=node), *args, **kwargs)
    except (RuntimeError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BackendError(
            f"{node.name}: OpenVINO refuses {target} with these arguments: {reason:.200}; "
            "use backend='x86' or backend='reference'"
        ) from error
    if getattr(getattr(target, "_schema", None), "is_mutable", False):
        written: Any = node.args[0]
        values[written] = values[node]


def _parameter(node: fx.Node) -> Any:
    value = node.meta["val"]
    sizes = [size if is_static(size) else -1 for size in value.shape]
    parameter = opset.parameter(ov.PartialShape(sizes), element_type(value.dtype), name=node.name)
    parameter.output(0).set_names({node.name})
    return parameter


def _real(value: Any) -> Any:
    return value.integers() if isinstance(value, Codes) else output(value)


def output_values(graph_module: fx.GraphModule) -> tuple[list[Tensor], bool]:
    """Fake values of the graph's outputs, and whether it returns them as a sequence."""
    found = next(node for node in graph_module.graph.nodes if node.op == "output").args[0]
    sequence = isinstance(found, (list, tuple))
    return [item.meta["val"] for item in (found if sequence else [found])], sequence
