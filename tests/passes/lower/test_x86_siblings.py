"""Linears that read the same codes run as one call with equal results; quantize steps of one tensor are shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qdiff_fx
from qdiff_fx.graph.edit import get_tensor, shared_copy
from qdiff_fx.kernels import BACKENDS
from qdiff_fx.lowering import lower
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.lower.integer_layers import sibling_linears
from qdiff_fx.passes.lower.shared_steps import ShareQuantizeSteps
from qdiff_fx.passes.lower.x86_siblings import MergeLinears

qdiff = torch.ops.qdiff
LINEARS = tuple(f"qdiff.{kernels}_linear.default" for kernels in ("x86", "vnni", "avx2"))

_REASON = BACKENDS["x86"].unavailable("cpu")
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


class Siblings(nn.Module):
    """q, k and v of one tensor, and two blocks that each apply SiLU to one embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 1)
        self.query = nn.Linear(16, 24, bias=False)
        self.key = nn.Linear(16, 24)
        self.value = nn.Linear(16, 8)
        self.first, self.second = nn.Linear(16, 8), nn.Linear(16, 24)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, sample: Tensor) -> Tensor:
        image = self.stem(sample)
        tokens = image.flatten(2).transpose(1, 2)
        query, key, value = self.query(tokens), self.key(tokens), self.value(tokens)
        embedding = image.mean(dim=(2, 3))
        shift = self.first(nn.functional.silu(embedding))
        scale = self.second(nn.functional.silu(embedding))
        scores = torch.softmax((query * scale[:, None]) @ key.transpose(1, 2), dim=2)
        mixed = (scores @ value + shift[:, None]).transpose(1, 2)
        return self.head(mixed.reshape(mixed.shape[0], 8, sample.shape[2], sample.shape[3]))


@pytest.fixture(scope="module", params=["w8a8", "w4a8"])
def quantized(request: pytest.FixtureRequest) -> qdiff_fx.QuantizedUNet:
    torch.manual_seed(0)
    module, example = Siblings().eval(), (torch.randn(2, 2, 4, 4),)
    config = qdiff_fx.QDiffConfig.preset(request.param, equalize=False)
    prepared = qdiff_fx.prepare(module, config, example_inputs=example)
    prepared(*example)
    return qdiff_fx.convert(prepared, backend="x86")


def calls(graph_module: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.target is target]


def linears(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if str(node.target) in LINEARS]


def context_of(model: qdiff_fx.QuantizedUNet) -> PassContext:
    return PassContext(config=model.qdiff_config, signature=model.signature)


def test_siblings_run_as_one_call_with_equal_results(quantized: qdiff_fx.QuantizedUNet) -> None:
    alone, _ = lower(quantized.plan, "x86", quantized.signature, separate=True)
    assert len(linears(alone)) == 5
    assert len(linears(quantized.lowered)) == 2
    for batch in (2, 3):
        sample = torch.randn(batch, 2, 6, 4)
        assert torch.equal(alone(sample)[0], quantized.lowered(sample)[0])


def test_every_merged_layer_keeps_its_row(quantized: qdiff_fx.QuantizedUNet) -> None:
    _, alone = lower(quantized.plan, "x86", quantized.signature, separate=True)
    merged = quantized.lowering_report()
    assert [(row.layer, row.dtype, row.bytes) for row in merged.rows] == [
        (row.layer, row.dtype, row.bytes) for row in alone.rows
    ]
    kernels = {row.layer: row.kernel for row in merged.rows}
    assert kernels["key"].removesuffix(", one of 3 merged") + ".default" in LINEARS and "one of 2" in kernels["second"]


def test_steps_and_siblings_are_shared_once(quantized: qdiff_fx.QuantizedUNet) -> None:
    plan, context = shared_copy(quantized.plan), context_of(quantized)
    assert len(calls(plan, torch.ops.aten.silu.default)) == 2
    assert ShareQuantizeSteps().run(plan, context).modified
    assert len(calls(plan, torch.ops.aten.silu.default)) == 1
    assert [len(group) for group in sibling_linears(plan)] == [3, 2]
    assert len(MergeLinears().run(plan, context).rewrites) == 5
    for graph_pass in (ShareQuantizeSteps(), MergeLinears()):
        assert not graph_pass.run(plan, context).modified


def test_steps_on_other_grids_stay_apart(quantized: qdiff_fx.QuantizedUNet) -> None:
    plan, context = shared_copy(quantized.plan), context_of(quantized)
    steps = [node for node in calls(plan, qdiff.quantize.default) if node.args[0].target is torch.ops.aten.silu.default]
    name = str(steps[1].args[1].target)
    with plan.graph.inserting_before(steps[1]):
        plan.register_buffer("learned", get_tensor(plan, name) * 1.01)
        other = plan.graph.get_attr("learned")
    steps[1].update_arg(1, other)
    ShareQuantizeSteps().run(plan, context)
    assert len(calls(plan, torch.ops.aten.silu.default)) == 1
    assert [len(group) for group in sibling_linears(plan)] == [3, 1, 1]
    assert len(MergeLinears().run(plan, context).rewrites) == 3


def test_codes_of_linears_are_written_as_they_are_read(quantized: qdiff_fx.QuantizedUNet) -> None:
    """Tokens are a transposed image: a copy of their codes would be made on every call."""

    class Watching(fx.Interpreter):
        seen: list[bool] = []  # noqa: RUF012

        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if str(target) in LINEARS:
                self.seen.append(args[0].is_contiguous())
            return super().call_function(target, args, kwargs)

    Watching(quantized.lowered).run(torch.randn(2, 2, 4, 4))
    assert Watching.seen == [True, True]
