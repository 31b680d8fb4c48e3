"""Units cover the graph, run alone, and pass on what the whole graph computes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from foreign.ddpm_style import DdpmUNet
from qdiff_fx.calibration.driver import activation_quantizers, weight_quantizers
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.reconstruction.subgraph import partition
from subjects import Sketch, calls_of, sketch_inputs


class _Record(fx.Interpreter):
    """Every node's value of one run."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


@pytest.fixture(params=["unconditional", "conditional", "sketch", "foreign"])
def prepared(request: pytest.FixtureRequest, preparer: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """A calibrated network and flat inputs."""
    if request.param == "foreign":
        module: nn.Module = DdpmUNet().eval()
        inputs = (torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]))
        return preparer(module, example_inputs=inputs), inputs
    module = request.getfixturevalue(request.param)
    call = calls_of(module)[1][0]
    options = {"example_inputs": sketch_inputs()} if isinstance(module, Sketch) else {}
    result = preparer(module, **options)
    return result, result.signature.flatten(call, {})


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_chained_units_compute_what_the_graph_computes(prepared: Any, granularity: str) -> None:
    model, inputs = prepared
    model.set_mode(QuantizerMode.PASS)
    with torch.no_grad():
        record = _Record(model.graph_module)
        record.run(*inputs)
        values: dict[str, Tensor] = dict(zip(model.signature.names, inputs, strict=True))
        for unit in partition(model.graph_module, granularity):
            outputs = unit.run([values[name] for name in unit.inputs], unit.full_weights, QuantizerMode.PASS)
            values.update(zip(unit.outputs, outputs, strict=True))
    for name, value in values.items():
        assert torch.equal(value, record.values[name]), name


# (block, its weights, its activation quantizers, inputs that come from other blocks or the caller)
_RESIDUAL, _WIDENING, _JOINING = (3, 3, 2), (4, 4, 2), (5, 5, 3)
"""A residual block alone, with a 1x1 skip, and with a skip that is split over a shortcut."""
_ATTENTION = (4, 5, 2)
_EMBEDDING = [("time_embedding.linear_1", 1, 1, 2), ("time_embedding.linear_2", 1, 1, 1), ("conv_in", 1, 0, 1)]
_MIDDLE = [("mid_block.resnets.0", *_RESIDUAL), ("mid_block.resnets.1", *_RESIDUAL)]

UNITS: dict[str, list[tuple[str, int, int, int]]] = {
    "unconditional": [
        *_EMBEDDING,
        ("down_blocks.0.resnets.0", *_RESIDUAL),
        ("down_blocks.0.downsamplers.0.conv", 1, 1, 1),
        ("down_blocks.1.resnets.0", *_WIDENING),
        ("down_blocks.1.attentions.0", *_ATTENTION),
        _MIDDLE[0],
        ("mid_block.attentions.0", *_ATTENTION),
        _MIDDLE[1],
        ("up_blocks.0.resnets.0", *_JOINING),
        ("up_blocks.0.attentions.0", *_ATTENTION),
        ("up_blocks.0.resnets.1", 5, 4, 3),  # its shortcut's quantizer belongs to an earlier reader
        ("up_blocks.0.attentions.1", *_ATTENTION),
        ("up_blocks.0.upsamplers.0.conv", 1, 1, 1),
        ("up_blocks.1.resnets.0", 5, 4, 3),
        ("up_blocks.1.resnets.1", *_JOINING),
        ("conv_out", 1, 0, 1),
    ],
    "conditional": [
        *_EMBEDDING,
        ("down_blocks.0.resnets.0", *_RESIDUAL),
        ("down_blocks.0.attentions.0", 12, 15, 3),
        ("down_blocks.0.downsamplers.0.conv", 1, 1, 1),
        ("down_blocks.1.resnets.0", *_WIDENING),
        _MIDDLE[0],
        ("mid_block.attentions.0", 12, 14, 3),  # the context is quantized once, by its first reader
        _MIDDLE[1],
        ("up_blocks.0.resnets.0", *_JOINING),
        ("up_blocks.0.resnets.1", 5, 4, 3),
        ("up_blocks.0.upsamplers.0.conv", 1, 1, 1),
        ("up_blocks.1.resnets.0", 5, 4, 3),
        ("up_blocks.1.attentions.0", 12, 14, 3),
        ("up_blocks.1.resnets.1", *_JOINING),
        ("up_blocks.1.attentions.1", 12, 14, 3),
        ("conv_out", 1, 0, 1),
    ],
    "foreign": [
        ("dense.0", 1, 1, 1),
        ("dense.1", 1, 1, 1),
        ("conv_in", 1, 0, 1),
        ("down0", *_RESIDUAL),
        ("downsample", 1, 1, 1),
        ("down1", *_WIDENING),
        ("down1_attn", *_ATTENTION),
        ("mid1", *_RESIDUAL),
        ("mid_attn", *_ATTENTION),
        ("mid2", *_RESIDUAL),
        ("up1", *_JOINING),
        ("up1_attn", *_ATTENTION),
        ("upsample", 1, 1, 1),
        ("up0.0", *_JOINING),
        ("up0.1", *_JOINING),
        ("conv_out", 1, 0, 1),
    ],
}


@pytest.mark.parametrize("prepared", UNITS, indirect=True)
def test_the_units_of_each_family_and_what_belongs_to_them(prepared: Any, request: pytest.FixtureRequest) -> None:
    units = partition(prepared[0].graph_module)
    found = [(unit.name, len(unit.weights), len(unit.quantizers), len(unit.inputs)) for unit in units]
    assert found == UNITS[request.node.callspec.params["prepared"]]
    for unit in units:
        assert len(unit.outputs) == 1, unit.name
        layers = [item.name for item in unit.weights]
        assert unit.name == "conv_out" or all(f"{unit.name}." in name for name in layers), (unit.name, layers)


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_every_weight_is_learned_in_exactly_one_block(prepared: Any, granularity: str) -> None:
    model, _ = prepared
    units = partition(model.graph_module, granularity)
    owned = [item.quantizer for unit in units for item in unit.weights if item.owned]
    assert Counter(owned) == Counter(quantizer for quantizer, _ in weight_quantizers(model.graph_module))


def test_every_step_size_is_learned_in_exactly_one_block(prepared: Any) -> None:
    model, _ = prepared
    found = [quantizer for unit in partition(model.graph_module) for quantizer in unit.quantizers]
    assert Counter(found) == Counter(quantizer for _, quantizer in activation_quantizers(model.graph_module))


def test_layers_alone_are_one_block_each(prepared: Any) -> None:
    model, _ = prepared
    blocks = [unit for unit in partition(model.graph_module, "layer") if unit.block is not None]
    assert len(blocks) == len(list(weight_quantizers(model.graph_module)))
    assert all(len(unit.outputs) == 1 for unit in blocks)


def test_a_residual_block_is_one_unit_named_after_its_module(unconditional: nn.Module, preparer: Any) -> None:
    units = partition(preparer(unconditional).graph_module)
    block = next(unit for unit in units if unit.name == "up_blocks.0.resnets.0")
    assert len(block.inputs) == 3 and len(block.outputs) == 1  # embedding, hidden state and shortcut
    names = [item.name.removeprefix("up_blocks.0.resnets.0.") for item in block.weights]
    assert sorted(names) == [
        "conv1.weight",
        "conv2.weight",
        "conv_shortcut.weight_part0",
        "conv_shortcut.weight_part1",
        "time_emb_proj.weight",
    ]


def test_upsampling_is_inside_the_block_that_reads_it(sketch: nn.Module, preparer: Any) -> None:
    units = partition(preparer(sketch, example_inputs=sketch_inputs()).graph_module)
    names = [str(node.target) for unit in units if unit.name == "skip" for node in unit.graph_module.graph.nodes]
    assert any("upsample" in name for name in names)
    assert not any("upsample" in name for unit in units for name in unit.inputs)


def test_units_hold_the_model_s_own_tensors_without_gradient(unconditional: nn.Module, preparer: Any) -> None:
    model = preparer(unconditional)
    for unit in partition(model.graph_module):
        tensors = [*unit.graph_module.state_dict(keep_vars=True).values(), *unit.full_weights]
        assert not any(tensor.requires_grad for tensor in tensors)
