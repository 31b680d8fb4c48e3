"""Layers behind quantizers become integer operators with packed weights under the weight's own name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qdiff_fx
from pass_checks import snapshot
from qdiff_fx.config import LayerRule, QDiffConfig
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.graph.edit import get_tensor, layer_call, shared_copy
from qdiff_fx.graph.meta import ATTENTION, LAYER
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.convert import CONVERT
from subjects import Preparer

aten, qdiff = torch.ops.aten, torch.ops.qdiff


def _converted(module: nn.Module, *inputs: Tensor, **config: Any) -> fx.GraphModule:
    """The plan of a module that was observed on the given inputs."""
    prepared = qdiff_fx.prepare(module.eval(), QDiffConfig(**config), example_inputs=inputs)
    with torch.no_grad():
        prepared(*inputs)
    return qdiff_fx.convert(prepared, backend="reference").plan


def _layers(plan: fx.GraphModule) -> dict[str, fx.Node]:
    return {policy.name: node for node in plan.graph.nodes if (policy := LAYER.get(node))}


def test_each_pass_is_honest_and_runs_twice_without_change(preparer: Preparer, sketch: nn.Module) -> None:
    prepared = preparer.fitted(sketch)
    graph_module = shared_copy(prepared.graph_module)
    context = PassContext(config=prepared.qdiff_config, signature=prepared.signature)
    for convert_pass in CONVERT:
        before = snapshot(graph_module)
        result = convert_pass.run(graph_module, context)
        after = snapshot(graph_module)
        assert result.modified == (before != after) and result.modified == bool(result.rewrites)
        assert not convert_pass.run(graph_module, context).modified and snapshot(graph_module) == after
    assert aten.view.default not in {node.target for node in graph_module.graph.nodes}


def test_the_sketch_becomes_these_operators(preparer: Preparer, sketch: nn.Module) -> None:
    plan = qdiff_fx.convert(preparer.fitted(sketch, "w4a8"), backend="reference").plan
    targets = {name: str(node.target) for name, node in _layers(plan).items()}
    assert targets == {
        "embed": "qdiff.linear.default",
        "stem": "aten.conv2d.default",
        "wide": "qdiff.conv2d.default",
        "down": "qdiff.conv2d.default",
        "qkv": "qdiff.conv2d.default",
        "project": "qdiff.linear.default",
        "skip#0": "qdiff.conv2d.default",
        "skip#1": "qdiff.conv2d.default",
        "head": "aten.conv2d.default",
    }
    assert [str(node.target) for node in plan.graph.nodes if ATTENTION.get(node)] == ["qdiff.attention.default"]
    assert not [node for node in plan.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize(("bits", "stored"), [(2, 0.5), (3, 0.5), (4, 0.5), (5, 1.0), (6, 1.0), (7, 1.0), (8, 1.0)])
def test_weights_are_packed_to_four_bits_or_stored_as_int8(bits: int, stored: float) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.head = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 5, 3), nn.Conv2d(5, 1, 1)

        def forward(self, sample: Tensor) -> Tensor:
            return self.head(self.inner(self.stem(sample)).sin())

    plan = _converted(Net(), torch.randn(2, 1, 6, 6), weight_bits=bits)
    packed = get_tensor(plan, "inner.weight_packed")
    assert packed.numel() == -(-3 * 5 * 9 * stored // 1) and packed.dtype == (torch.uint8 if bits <= 4 else torch.int8)
    assert get_tensor(plan, "inner.weight_scale").shape == (5,)
    assert hasattr(plan.inner, "weight_zero_point") == (bits <= 4)
    assert not hasattr(plan.inner, "weight")


def test_a_conv1d_runs_as_a_conv2d_of_one_row() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(1, 4, 1), nn.Conv2d(2, 1, 1)
            self.inner = nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2)

        def forward(self, sample: Tensor) -> Tensor:
            h = self.inner(self.stem(sample).flatten(2))
            return self.head(h.reshape(sample.shape[0], 2, 3, -1).sin())

    plan = _converted(Net(), torch.randn(2, 1, 4, 8))
    node = _layers(plan)["inner"]
    assert node.args[8:13] == ([6, 2, 1, 3], [1, 2], [0, 2], [1, 2], 2)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("padding", "wanted"), [("same", [2, 4]), ("valid", [0, 0])])
def test_named_paddings_become_numbers(padding: str, wanted: list[int]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1)
            self.inner = nn.Conv2d(4, 4, (3, 5), padding=padding, dilation=2)

        def forward(self, sample: Tensor) -> Tensor:
            return self.head(self.inner(self.stem(sample)).sin())

    plan = _converted(Net(), torch.randn(2, 1, 16, 16))
    assert _layers(plan)["inner"].args[10] == wanted


class Shared(nn.Module):
    """Two layers read one tensor, and one weight serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, sample: Tensor) -> Tensor:
        h = self.stem(sample).sin()
        return self.head(self.a(self.a(h)).sin() * self.b(h))


def test_a_tensor_that_two_layers_read_is_quantized_once_and_a_shared_weight_stored_once() -> None:
    plan = _converted(Shared(), torch.randn(2, 1, 4, 4))
    quantizers = [node for node in plan.graph.nodes if node.target is qdiff.quantize.default]
    assert sorted(len(node.users) for node in quantizers) == [1, 2]
    layers = _layers(plan)
    assert get_tensor(plan, layers["a"].args[1].target) is get_tensor(plan, layers["a@1"].args[1].target)


def test_readers_with_other_widths_get_quantizers_of_their_own() -> None:
    plan = _converted(Shared(), torch.randn(2, 1, 4, 4), rules=(LayerRule(module="b", activation_bits=4),))
    assert len([node for node in plan.graph.nodes if node.target is qdiff.quantize.default]) == 3


def test_one_weight_under_two_policies_keeps_both_forms() -> None:
    class Reused(nn.Module):
        """The layer that reads the sample is called again inside: W8 at the boundary, W4 behind it."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)

        def forward(self, sample: Tensor) -> Tensor:
            return self.head(self.conv(self.conv(sample).sin()).sin())

    torch.manual_seed(0)
    module, x = Reused(), torch.randn(2, 2, 6, 6)
    prepared = qdiff_fx.prepare(module.eval(), QDiffConfig(activation_bits=32), example_inputs=(x,))
    quantized = qdiff_fx.convert(prepared, backend="reference")
    stored = [
        node.args[0].target for node in quantized.plan.graph.nodes if node.target is qdiff.dequantize_weight.default
    ]
    assert len(set(stored)) == 3
    dtypes = [get_tensor(quantized.plan, target).dtype for target in stored]
    assert dtypes == [torch.int8, torch.uint8, torch.int8]
    prepared.set_mode(QuantizerMode.QUANTIZE)
    with torch.no_grad():
        # Weight-only: the same float32 operations on the same weights.
        torch.testing.assert_close(quantized(x), prepared(x), rtol=1e-5, atol=1e-6)


def test_a_layer_without_quantizers_is_left_alone() -> None:
    plan = _converted(Shared(), torch.randn(2, 1, 4, 4), rules=(LayerRule(module="b", weight_bits=32),))
    node = _layers(plan)["b"]
    assert layer_call(node) is not None and get_tensor(plan, "b.weight").dtype == torch.float32
