"""Run one pass on a small module and hold it to what every pass promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qdiff_fx.config import QDiffConfig
from qdiff_fx.graph.capture import capture
from qdiff_fx.passes.base import GraphPass, PassContext, PassResult, run_passes


@dataclass(frozen=True, kw_only=True)
class PassRun:
    """A graph after a pass, beside the module that it was captured from."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    graph_module: fx.GraphModule
    context: PassContext
    result: PassResult

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph_module.graph.nodes)

    @property
    def operators(self) -> list[str]:
        """Names of the called operators, in order, without overloads."""
        return [str(node.target).split(".")[1] for node in self.nodes if node.op == "call_function"]

    def count(self, operator: str) -> int:
        return self.operators.count(operator)

    @property
    def reasons(self) -> list[str]:
        return [refusal.reason for refusal in self.result.refusals]

    @torch.no_grad()
    def error(self) -> float:
        """Largest difference to the module's output, as a share of its largest value."""
        wanted = self.module(*self.inputs)
        seen = self.graph_module(*self.inputs)[0]
        assert seen.shape == wanted.shape and seen.dtype == wanted.dtype
        return float((seen - wanted).abs().max() / wanted.abs().max())


ROUNDING = 1e-12
"""Of a rewrite in float64: sums in another order, a few thousand terms at 2^-53 each."""


def run_pass(
    graph_pass: GraphPass,
    module: nn.Module,
    inputs: Sequence[Tensor],
    *,
    config: QDiffConfig | None = None,
    before: tuple[GraphPass, ...] = (),
    sample_input: str | None = None,
) -> PassRun:
    """The pass on the captured module; checks that `modified` is honest and that a second run changes nothing."""
    captured = capture(module.eval(), tuple(inputs), sample_input=sample_input)
    graph_module = captured.graph_module
    context = PassContext(config=config or QDiffConfig(), signature=captured.signature)
    run_passes(before, graph_module, context)
    original = snapshot(graph_module)
    result = graph_pass.run(graph_module, context)
    rewritten = snapshot(graph_module)
    assert result.modified == (rewritten != original)
    assert result.name == type(graph_pass).__name__
    again = graph_pass.run(graph_module, context)
    assert not again.modified and snapshot(graph_module) == rewritten
    graph_module.graph.lint()
    return PassRun(module=module, inputs=tuple(inputs), graph_module=graph_module, context=context, result=result)


def snapshot(graph_module: fx.GraphModule) -> list[Any]:
    """Everything that a pass may change: nodes, arguments, our metadata, modules and tensors."""
    nodes = [
        (node.format_node(), sorted((key, repr(value)) for key, value in node.meta.items() if key.startswith("qdiff")))
        for node in graph_module.graph.nodes
    ]
    return [nodes, sorted(graph_module.state_dict()), [name for name, _ in graph_module.named_modules()]]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
