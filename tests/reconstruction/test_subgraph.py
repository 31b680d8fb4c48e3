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
