"""Raise single quantizers above what the config gave them: 4-bit weights to 8, activations to the carrier type."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx

from qdiff_fx.fake_quantize import ActivationQuantizer, AttentionQuantizer, WeightQuantizer
from qdiff_fx.graph.edit import get_tensor, layer_call
from qdiff_fx.graph.meta import ATTENTION, LAYER, LayerPolicy
from qdiff_fx.numerics.spec import weight_spec
from qdiff_fx.passes.base import GraphPass, PassContext, PassResult, Refusal, finish
from qdiff_fx.passes.prepare.correct_biases import drop_correction


@dataclass(frozen=True, kw_only=True)
class Raise:
    """One decision.

    Args:
      kind: "weight", "input" of layers, or "softmax": the probabilities of an attention.
      target: the quantizer's name in the graph module.
      layers: names of the layers that read it.
      bits: the new width; None is the carrier type.
      reason: why, for the plan and the reports.
    """

    kind: Literal["weight", "input", "softmax"]
    target: str
    layers: tuple[str, ...]
    bits: int | None
    reason: str = ""

    def because(self, reason: str) -> Raise:
        """The same decision with its reason."""
        return replace(self, reason=reason)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"kind": self.kind, "layers": list(self.layers), "bits": self.bits, "reason": self.reason}


class ApplyRaises(GraphPass):
    """Give the named quantizers their new widths and write the reasons into the layers' policies.

    A raised weight is fitted anew. A layer input that goes to the carrier type loses its quantizer, and so do an
    attention's probabilities. A weight that goes to the carrier type takes its layers' inputs along.

    Left alone: quantizers that are gone already (an input whose weight was raised to the carrier).
    """

    def __init__(self, raises: tuple[Raise, ...]) -> None:
        self.raises = raises

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        calls = {str(node.target): node for node in graph_module.graph.nodes if node.op == "call_module"}
        rewrites: list[str] = []
        refusals: list[Refusal] = []
        for decision in self.raises:
            node = calls.get(decision.target)
            if node is None or node._erased:
                refusals.append(Refusal(node=decision.target, reason="its quantizer is gone already"))
            elif _apply(graph_module, node, decision):
                rewrites.append(node.name)
        if rewrites:
            finish(graph_module)
        return PassResult(name=self.name, modified=bool(rewrites), rewrites=tuple(rewrites), refusals=tuple(refusals))


def _apply(graph_module: fx.GraphModule, node: fx.Node, decision: Raise) -> bool:
    quantizer = graph_module.get_submodule(str(node.target))
    if isinstance(quantizer, ActivationQuantizer):
        for user in list(node.users):
            if layer_call(user) is not None:
                _to_carrier(graph_module, user, decision.reason)
        return True
    if isinstance(quantizer, AttentionQuantizer):
        if quantizer.probabilities is None:
            return False
        graph_module.set_submodule(str(node.target), quantizer.without_probabilities())  # others may share it
        ATTENTION.set(node, replace(ATTENTION.require(node), probabilities=None))
        return True
    assert isinstance(quantizer, WeightQuantizer)
    if decision.bits == quantizer.spec.bits:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if decision.bits is None:
        for user in list(node.users):
            user.replace_input_with(node, source)
            drop_correction(graph_module, user)
            _set_policy(user, decision.reason, weight=None)
            _to_carrier(graph_module, user, decision.reason)
        return True
    _refit(graph_module, node, quantizer, decision.bits, keep_factor=True)
    for user in node.users:
        _set_policy(user, decision.reason, weight=weight_spec(decision.bits))
    return True


def _refit(
    graph_module: fx.GraphModule, node: fx.Node, quantizer: WeightQuantizer, bits: int, *, keep_factor: bool
) -> None:
    """Replace a weight quantizer, which other graphs may share, by one of another width or without its factor."""
    fitted = quantizer.unfitted(weight_spec(bits))
    fitted.channel_factor = quantizer.channel_factor if keep_factor else None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    weight = get_tensor(graph_module, source.target)
    fitted.to(weight.device).fit(weight)
    graph_module.set_submodule(str(node.target), fitted)
    for user in list(node.users):
        drop_correction(graph_module, user)  # of the errors that the former rounding made


def _to_carrier(graph_module: fx.GraphModule, user: fx.Node, reason: str) -> None:
    """Let a layer read its input unquantized; its weight gives up channel factors, which belong to that input."""
    call = user.args[0]
    assert isinstance(call, fx.Node)
    if call.op == "call_module" and isinstance(call.args[0], fx.Node):
        user.replace_input_with(call, call.args[0])
    weight = user.args[1]
    assert isinstance(weight, fx.Node)
    if weight.op == "call_module":
        quantizer = graph_module.get_submodule(str(weight.target))
        if isinstance(quantizer, WeightQuantizer) and quantizer.channel_factor is not None:
            _refit(graph_module, weight, quantizer, quantizer.spec.bits, keep_factor=False)
    _set_policy(user, reason, activation=None)


def _set_policy(node: fx.Node, reason: str, **changes: Any) -> None:
    """Change a layer's widths; its reasons so far stay, since a weight and its input are raised one by one."""
    policy: LayerPolicy = LAYER.require(node)
    known = [] if policy.reason == "config" else policy.reason.split("; ")
    LAYER.set(node, replace(policy, reason="; ".join(dict.fromkeys([*known, reason])), **changes))
