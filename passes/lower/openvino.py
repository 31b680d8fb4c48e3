"""The whole plan as one program of OpenVINO's."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qdiff_fx.graph.edit import add_module, delete_tensor
from qdiff_fx.graph.meta import FALLBACK, KERNEL, PARTS
from qdiff_fx.passes.base import GraphPass, PassContext, PassResult, finish

aten = torch.ops.aten
qdiff = torch.ops.qdiff

_INTEGER = (qdiff.conv2d.default, qdiff.linear.default)
_REPORTED = (
    *_INTEGER,
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.linear.default,
    aten.scaled_dot_product_attention.default,
    qdiff.attention.default,
)


class RunByOpenVINO(GraphPass):
    """All calls of the graph become one call of a compiled OpenVINO model.

    What each layer really runs on is asked of the compiled model and kept with the nodes that the call stands for; an
    integer layer that the plugin runs in floating point, or that no kernel lists among those it stands for, is a
    fallback.

    Left alone: graphs under `separate`, where every layer's result must be seen; they run the plan's own operators.
    """

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        nodes = list(graph_module.graph.nodes)
        calls = [node for node in nodes if node.op == "call_function"]
        if context.separate or not calls:
            return PassResult(name=self.name, modified=False)
        # Here, not at the top: the library is an extra.
        from qdiff_fx.kernels.openvino_nodes.builder import build_model, output_values
        from qdiff_fx.kernels.openvino_nodes.program import Program

        outputs, sequence = output_values(graph_module)
        program = Program(
            build_model(graph_module),
            outputs,
            sequence=sequence,
            carrier=_carrier(graph_module, context),
            threads=torch.get_num_threads(),
        )
        _tell_kernels(calls, program.placement())
        _replace(graph_module, calls, program)
        return PassResult(name=self.name, modified=True, rewrites=tuple(node.name for node in calls))


def _carrier(graph_module: fx.GraphModule, context: PassContext) -> torch.dtype:
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and node.name == context.signature.sample:
            dtype: torch.dtype = node.meta["val"].dtype
            return dtype
    return torch.float32


def _tell_kernels(calls: list[fx.Node], placement: Any) -> None:
    for node in calls:
        if node.target not in _REPORTED:
            continue
        runs = placement.get(node.name)
        if runs is None:
            KERNEL.set(node, "openvino, part of another kernel")
            if node.target in _INTEGER:
                FALLBACK.set(node, "no kernel of OpenVINO's compiled model names it, so nothing shows it on integers")
            continue
        KERNEL.set(node, f"openvino {runs.kind} {runs.precision} {runs.implementation}")
        if node.target in _INTEGER and not runs.is_integer:
            FALLBACK.set(node, f"OpenVINO runs it in {runs.precision}")


def _replace(graph_module: fx.GraphModule, calls: list[fx.Node], program: torch.nn.Module) -> None:
    graph = graph_module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    end = next(node for node in graph.nodes if node.op == "output")
    name = add_module(graph_module, "openvino_program", program)
    with graph.inserting_before(end):
        call = graph.call_module(name, tuple(inputs))
    PARTS.set(call, tuple(calls))
    value: Any = fx.node.map_arg(end.args[0], lambda item: item.meta["val"])
    call.meta["val"] = value
    end.args = (call,)
    constants = [node for node in graph.nodes if node.op == "get_attr"]
    for node in reversed([*constants, *calls]):
        graph.erase_node(node)
    finish(graph_module)
    # The program holds what it reads in its own layout.
    for tensor in [*dict(graph_module.named_parameters()), *dict(graph_module.named_buffers())]:
        delete_tensor(graph_module, tensor)
