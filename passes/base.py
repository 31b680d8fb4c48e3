"""Passes: find a pattern, check that it may be rewritten, rewrite it, and say honestly what happened."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import fx

from qdiff_fx.config import QDiffConfig
from qdiff_fx.fake_quantize import NoiseLevel
from qdiff_fx.graph.signature import CallSignature

M = TypeVar("M")


@dataclass(kw_only=True)
class PassContext:
    """What passes may know beside the graph.

    Args:
      config: the user's quantization settings.
      signature: names of the graph's inputs and which of them is the noisy sample.
      noise_level: shared with every quantizer, so that ranges are kept by timestep.
      strict: keep what the plan says in every node, simulated where there is no kernel.
      separate: let every layer's result be seen in the graph, as no kernel that goes on with it does.
      carrier_layers: nodes of integer layers and attentions that were timed faster in the carrier type, and why.
      kernels: the fastest integer kernel, by the backend's name for it, of nodes that have several.
    """

    config: QDiffConfig
    signature: CallSignature
    noise_level: NoiseLevel = field(default_factory=NoiseLevel)
    strict: bool = False
    separate: bool = False
    carrier_layers: Mapping[str, str] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A place that the pattern matched and the check left alone."""

    node: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """What one run of a pass did.

    Args:
      name: the pass.
      modified: whether the graph or its metadata changed.
      rewrites: names of the nodes that were rewritten.
      refusals: matches that were left alone, and why.
    """

    name: str
    modified: bool
    rewrites: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()


class GraphPass(ABC):
    """A transformation of a GraphModule in place; running it a second time changes nothing."""

    @property
    def name(self) -> str:
        """The pass's name in results and logs."""
        return type(self).__name__

    @abstractmethod
    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Transform `graph_module`."""


class RewritePass(GraphPass, Generic[M]):
    """A pass that visits every node once, in order: `pattern`, then `check`, then `rewrite`."""

    @abstractmethod
    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> M | None:
        """The match that ends at `node`, or None."""

    def check(self, match: M, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        """Why the match must be left alone, or None to rewrite it."""
        return None

    @abstractmethod
    def rewrite(self, match: M, graph_module: fx.GraphModule, context: PassContext) -> None:
        """Change the graph at the match."""

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        rewrites: list[str] = []
        refusals: list[Refusal] = []
        for node in list(graph_module.graph.nodes):
            # A rewrite may have erased nodes that stand later in the snapshot.
            if node._erased or (match := self.pattern(node, graph_module, context)) is None:
                continue
            reason = self.check(match, graph_module, context)
            if reason is None:
                self.rewrite(match, graph_module, context)
                rewrites.append(node.name)
            else:
                refusals.append(Refusal(node=node.name, reason=reason))
        if rewrites:
            finish(graph_module)
        return PassResult(name=self.name, modified=bool(rewrites), rewrites=tuple(rewrites), refusals=tuple(refusals))


def finish(graph_module: fx.GraphModule) -> None:
    """Drop what became dead and regenerate the module's code."""
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()


def run_passes(
    passes: tuple[GraphPass, ...],
    graph_module: fx.GraphModule,
    context: PassContext,
    on_pass: Callable[[str], None] | None = None,
) -> tuple[PassResult, ...]:
    """Run `passes` in order on `graph_module`; `on_pass` gets the name of each as it begins."""
    results: list[PassResult] = []
    for graph_pass in passes:
        if on_pass is not None:
            on_pass(graph_pass.name)
        results.append(graph_pass.run(graph_module, context))
    return tuple(results)
