"""Linears that read the same codes become one on cuda, and every layer keeps its result."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

import qdiff_fx
from qdiff_fx.graph.edit import get_tensor
from qdiff_fx.graph.meta import MERGED
from qdiff_fx.lowering import lower
from qdiff_fx.passes.base import PassContext, run_passes
from qdiff_fx.passes.lower.integer_layers import IntegerLayer, integer_layer
from qdiff_fx.passes.lower.merged_linears import MergeStoredLinears, alike
from qdiff_fx.passes.lower.shared_steps import ShareQuantizeSteps
from subjects import signal_to_noise


class Projections(nn.Module):
    """q, k and v of one input, of which one has no bias, and a projection of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 24), nn.Linear(16, 24, bias=False), nn.Linear(16, 8)
        self.out = nn.Linear(8, 16)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        scores = torch.softmax(self.q(sample) @ self.k(sample).transpose(-1, -2), dim=-1)
        result: Tensor = self.out(scores @ self.v(sample)) * timestep.view(-1, 1, 1)
        return result


def quantized(preset: str) -> qdiff_fx.QuantizedUNet:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 7, 16), torch.ones(2))
    config = qdiff_fx.QDiffConfig.preset(
        preset, equalize=False, quantize_boundaries=True, weight_slack=0.0, activation_slack=0.0
    )
    prepared = qdiff_fx.prepare(Projections().eval(), config, example_inputs=inputs)
    for _ in range(2):
        prepared(*inputs)
    return qdiff_fx.convert(prepared, backend="reference")


@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_every_layer_keeps_its_result(preset: str) -> None:
    model = quantized(preset)
    inputs = (torch.randn(2, 7, 16), torch.ones(2))
    wanted = model(*inputs)
    plan = copy.deepcopy(model.plan)
    context = PassContext(config=qdiff_fx.QDiffConfig(), signature=model.signature)
    _, merged = run_passes((ShareQuantizeSteps(), MergeStoredLinears()), plan, context)
    assert len(merged.rewrites) == 3
    layers = [layer for node in plan.graph.nodes if (layer := integer_layer(node)) is not None]
    assert sorted(layer.weight_shape for layer in layers) == [[16, 8], [56, 16]]
    assert [MERGED.get(node) for node in plan.graph.nodes if MERGED.get(node)] == [3, 3, 3]
    (result,) = plan(*model.signature.flatten(inputs, {}))
    assert torch.equal(result, wanted)
    # Stored as they were: 4-bit ones stay packed.
    (whole,) = (layer for layer in layers if layer.weight_shape == [56, 16])
    assert get_tensor(plan, whole.weight.target).numel() == 56 * 16 // (2 if preset == "w4a8" else 1)
    assert whole.bias is not None and not get_tensor(plan, whole.bias.target)[24:48].any()
    again = run_passes((ShareQuantizeSteps(), MergeStoredLinears()), plan, context)
    assert not any(item.modified for item in again)


def test_where_every_result_is_asked_for_nothing_is_merged() -> None:
    model = quantized("w8a8")
    plan = copy.deepcopy(model.plan)
    context = PassContext(config=qdiff_fx.QDiffConfig(), signature=model.signature, separate=True)
    _, merged = run_passes((ShareQuantizeSteps(), MergeStoredLinears()), plan, context)
    assert not merged.modified


def test_layers_that_cannot_stand_below_each_other_stay_apart() -> None:
    """An odd number of 4-bit codes ends within a byte, and packed rows have other zero points than int8 ones."""
    graph = fx.Graph()
    x, zero_point = graph.placeholder("x"), graph.placeholder("zero_point")
    graph.output(x)
    module = fx.GraphModule(nn.Module(), graph)

    def layer(outputs: int, depth: int, *, packed: bool = True) -> IntegerLayer:
        return IntegerLayer(
            node=x,
            x=x,
            weight=x,
            weight_scale=x,
            weight_zero_point=zero_point if packed else None,
            channel_shift=None,
            bias=None,
            x_scale=1.0,
            x_zero_point=0,
            weight_shape=[outputs, depth],
            output_dtype=torch.float32,
        )

    odd, even, wide, whole = layer(9, 5), layer(4, 5), layer(6, 5), layer(9, 5, packed=False)
    for order in ([odd, even, wide, whole], [even, odd, whole, wide]):
        groups = alike(order, module)
        assert [odd] in groups and [whole] in groups and [even, wide] in groups


def test_a_lowered_network_runs_them_at_once_and_reports_each() -> None:
    model = quantized("w4a8")
    inputs = (torch.randn(2, 7, 16), torch.ones(2))
    lowered, report = lower(model.plan, "cuda", model.signature)
    calls = [node for node in lowered.graph.nodes if str(node.target) == "qdiff.cuda_linear.default"]
    assert len(calls) == 2
    rows = {row.layer: row for row in report.rows if row.bytes}
    assert {name: "one of 3 merged" in row.kernel for name, row in rows.items()} == {
        "q": True, "k": True, "v": True, "out": False
    }  # fmt: skip
    assert not [name for name, _ in lowered.named_buffers() if "merged" in name and "cuda" not in name]
    apart, _ = lower(model.plan, "cuda", model.signature, separate=True)
    flat = model.signature.flatten(inputs, {})
    assert signal_to_noise(apart(*flat)[0], lowered(*flat)[0]) > 60
