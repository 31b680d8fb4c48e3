"""Quantizers go where the policies say, one for each tensor and grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional

from pass_checks import ROUNDING, PassRun, double, run_pass
from qdiff_fx.config import LayerRule, QDiffConfig
from qdiff_fx.fake_quantize import ActivationQuantizer, AttentionQuantizer, WeightQuantizer
from qdiff_fx.graph.meta import ATTENTION, LAYER
from qdiff_fx.passes.prepare.annotate import AnnotatePolicies
from qdiff_fx.passes.prepare.insert_quantizers import InsertQuantizers
from subjects import Preparer, sketch_inputs


class Readers(nn.Module):
    """One tensor is read by two convolutions, and as tokens by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.tokens, self.head = nn.Linear(4, 4), nn.Conv2d(4, 2, 1)
        self.double()

    def forward(self, sample: Tensor) -> Tensor:
        h = self.stem(sample).tanh()
        tokens = self.tokens(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head((self.a(h) * self.b(h) + tokens + self.b(tokens)).sin())


def _insert(module: nn.Module, *inputs: Tensor, **config: Any) -> PassRun:
    return run_pass(InsertQuantizers(), module, inputs, config=QDiffConfig(**config), before=(AnnotatePolicies(),))


def _quantizers(run: PassRun, kind: type[nn.Module]) -> list[Any]:
    calls = [run.graph_module.get_submodule(str(node.target)) for node in run.nodes if node.op == "call_module"]
    return [module for module in calls if isinstance(module, kind)]


SAMPLE = (2, 2, 6, 6)


def test_an_observing_graph_computes_what_the_module_computes() -> None:
    assert _insert(Readers(), double(*SAMPLE)).error() < ROUNDING


def test_a_tensor_is_quantized_once_for_all_its_readers_of_one_grid() -> None:
    run = _insert(Readers(), double(*SAMPLE))
    names = sorted(quantizer.name for quantizer in _quantizers(run, ActivationQuantizer))
    assert names == ["a.input", "b@1.input", "tokens.input"], "h serves a and b; its permuted view is another tensor"
    shared = [node for node in run.nodes if len(node.users) == 2 and node.op == "call_module"]
    assert {run.graph_module.get_submodule(str(node.target)).name for node in shared} == {"a.input", "b"}


def test_a_reader_of_another_grid_gets_its_own() -> None:
    run = _insert(Readers(), double(*SAMPLE), rules=(LayerRule(module="b", activation_bits=4),))
    grids = {quantizer.name: quantizer.spec.bits for quantizer in _quantizers(run, ActivationQuantizer)}
    assert grids == {"a.input": 8, "b.input": 4, "b@1.input": 4, "tokens.input": 8}


def test_a_weight_that_serves_twice_is_quantized_once() -> None:
    run = _insert(Readers(), double(*SAMPLE))
    assert sorted(quantizer.name for quantizer in _quantizers(run, WeightQuantizer)) == [
        "a",
        "b",
        "head",
        "stem",
        "tokens",
    ]


def test_operands_that_stay_in_the_carrier_get_none() -> None:
    run = _insert(Readers(), double(*SAMPLE), activation_bits=32, rules=(LayerRule(module="a", weight_bits=32),))
    assert not _quantizers(run, ActivationQuantizer)
    assert {quantizer.name for quantizer in _quantizers(run, WeightQuantizer)} == {"b", "head", "stem", "tokens"}


def test_channel_axes_and_groups_follow_the_operator(preparer: Preparer, sketch: nn.Module) -> None:
    prepared = preparer(sketch, example_inputs=sketch_inputs())
    modules = dict(prepared.graph_module.named_modules())
    axes = {item.name: item.channel_axis for item in modules.values() if isinstance(item, ActivationQuantizer)}
    assert axes["wide.input"] == axes["qkv.input"] == 1 and axes["project.input"] == axes["embed.input"] == -1
    groups = {item.name: item.groups for item in modules.values() if isinstance(item, WeightQuantizer)}
    assert groups["wide"] == 2 and groups["down"] == 1


class Attention(nn.Module):
    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return self.attend(query, key, value, mask)


sdpa = functional.scaled_dot_product_attention

ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda q, k, v, mask: sdpa(q, k, v),
    "mask": lambda q, k, v, mask: sdpa(q, k, v, mask),
    "boolean mask": lambda q, k, v, mask: sdpa(q, k, v, mask > -1),
    "scale": lambda q, k, v, mask: sdpa(q, k, v, scale=0.2),
    "causal": lambda q, k, v, mask: sdpa(q, k, v, is_causal=True),
    "mask and scale": lambda q, k, v, mask: sdpa(q, k, v, attn_mask=mask, scale=0.2),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_attention_becomes_one_module_with_its_mask_and_scale(name: str) -> None:
    inputs = (double(2, 3, 5, 4), double(2, 3, 7, 4), double(2, 3, 7, 4), double(2, 1, 5, 7))
    run = _insert(Attention(ATTENTIONS[name]), *inputs)
    (quantizer,) = _quantizers(run, AttentionQuantizer)
    assert sorted(quantizer.operands) == ["key", "query", "value"]
    assert "scaled_dot_product_attention" not in run.operators and run.error() < ROUNDING
    assert [ATTENTION.get(node) is not None for node in run.nodes if node.op == "call_module"] == [True]


def test_an_attention_in_the_carrier_type_is_left_alone() -> None:
    inputs = (double(2, 3, 5, 4), double(2, 3, 7, 4), double(2, 3, 7, 4), double(2, 1, 5, 7))
    run = _insert(Attention(ATTENTIONS["plain"]), *inputs, activation_bits=32)
    assert not run.result.modified and run.count("scaled_dot_product_attention") == 1


def test_grouped_queries_are_refused_with_the_reason() -> None:
    inputs = (double(2, 4, 5, 4), double(2, 2, 7, 4), double(2, 2, 7, 4), double(2, 1, 5, 7))
    run = _insert(Attention(lambda q, k, v, mask: sdpa(q, k, v, enable_gqa=True)), *inputs)
    assert not run.result.modified and run.reasons == ["enable_gqa=True: its heads are not those of its keys"]
    assert run.error() < ROUNDING


def test_an_input_that_is_quantized_directly_keeps_the_inputs_in_front() -> None:
    run = _insert(Readers(), double(*SAMPLE), quantize_boundaries=True)
    kinds = [node.op for node in run.nodes if node.op != "get_attr"]
    assert kinds[0] == "placeholder" and "placeholder" not in kinds[1:]
    assert "stem.input" in {quantizer.name for quantizer in _quantizers(run, ActivationQuantizer)}


def test_layers_without_a_policy_are_left_alone() -> None:
    run = run_pass(InsertQuantizers(), Readers(), (double(*SAMPLE),))
    assert not run.result.modified and not any(LAYER.get(node) for node in run.nodes)
