"""Run every layer of a converted graph on the input that the same layer had in the fake-quantized graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.fake_quantize import ActivationQuantizer, AttentionQuantizer
from qdiff_fx.graph.edit import layer_call
from qdiff_fx.graph.meta import ATTENTION, LAYER

aten, qdiff = torch.ops.aten, torch.ops.qdiff


class Recorder(fx.Interpreter):
    """Keeps, by the name in the policy: what a layer read before quantization, what it gave, and its magnitude."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.inputs: dict[str, tuple[Any, ...]] = {}
        self.outputs: dict[str, Tensor] = {}
        self.magnitudes: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        policy, attention, layer = LAYER.get(n), ATTENTION.get(n), layer_call(n)
        if policy is not None and layer is not None:
            source = layer.input
            if source.op == "call_module" and isinstance(self.fetch_attr(str(source.target)), ActivationQuantizer):
                assert isinstance(source.args[0], fx.Node)
                source = source.args[0]
            self.inputs[policy.name], self.outputs[policy.name] = (self.env[source],), result
            # Terms of a sum cancel; rounding errors do not. So errors are held to the sum of the terms' magnitudes.
            args = [item.abs() if isinstance(item, Tensor) else item for item in self.fetch_args_kwargs_from_env(n)[0]]
            self.magnitudes[policy.name] = n.target(*args)  # type: ignore[operator]
        elif attention is not None and n.op == "call_module":
            assert isinstance(self.fetch_attr(str(n.target)), AttentionQuantizer)
            self.inputs[attention.name], self.outputs[attention.name] = (
                self.fetch_args_kwargs_from_env(n)[0][:3],
                result,
            )
            self.magnitudes[attention.name] = result.abs().max().expand_as(result)
        return result


class Replayer(fx.Interpreter):
    """Runs a converted graph, every layer on a recorded input; `outputs` by the name in the policy."""

    def __init__(self, graph_module: fx.GraphModule, inputs: dict[str, tuple[Any, ...]]) -> None:
        super().__init__(graph_module)
        self.recorded, self.outputs = inputs, dict[str, Tensor]()
        self.quantized: dict[fx.Node, str] = {}
        for node in graph_module.graph.nodes:
            policy = LAYER.get(node)
            if policy is not None and node.target in (qdiff.conv2d.default, qdiff.linear.default):
                source = node.args[0]
                source = source.args[0] if source.target is aten.unsqueeze.default else source  # a conv1d
                assert source.target is qdiff.quantize.default
                self.quantized[source] = policy.name

    def run_node(self, n: fx.Node) -> Any:
        policy, attention = LAYER.get(n), ATTENTION.get(n)
        name = self.quantized.get(n)
        if policy is not None and name is None and n.target not in (qdiff.conv2d.default, qdiff.linear.default):
            name = policy.name
        if attention is not None and n.target is qdiff.attention.default:
            name = attention.name
        if name is None:
            result = super().run_node(n)
        else:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            inputs = self.recorded[name]
            result = n.target(*inputs, *args[len(inputs) :], **kwargs)  # type: ignore[operator]
        if policy is not None:
            self.outputs[policy.name] = result
        elif attention is not None and name is not None:
            self.outputs[attention.name] = result
        return result


@torch.no_grad()
def largest_errors(prepared: fx.GraphModule, converted: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[str, float]:
    """By layer: the largest difference of its outputs, as a share of the magnitude of the summed terms."""
    recorder = Recorder(prepared)
    recorder.run(*inputs)
    replayer = Replayer(converted, recorder.inputs)
    replayer.run(*inputs)
    assert replayer.outputs.keys() == recorder.outputs.keys()
    errors: dict[str, float] = {}
    for name, wanted in recorder.outputs.items():
        seen = replayer.outputs[name]
        assert seen.numel() == wanted.numel() and seen.dtype == wanted.dtype
        difference = (seen.reshape(wanted.shape).float() - wanted.float()).abs()
        errors[name] = float((difference / recorder.magnitudes[name].float().clamp(min=1e-30)).max())
    return errors
