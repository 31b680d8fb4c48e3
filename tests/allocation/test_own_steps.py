"""Layers that share a quantized tensor share its factor, unless one of them is clearly better off alone."""

import pytest
import torch
from torch import Tensor, nn

import qdiff_fx
from qdiff_fx.allocation.channel_factors import choose_channel_factors
from qdiff_fx.allocation.units import input_units
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.model import PreparedUNet
from qdiff_fx.numerics.metrics import sqnr_db
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.prepare.own_quantizers import GiveOwnQuantizers

CONFIG = {"weight_slack": 0.0, "activation_slack": 0.0}


class Shared(nn.Module):
    """Two layers read one tensor with a loud channel; `opposed` makes one of them need it finely, the other not."""

    def __init__(self, opposed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.a, self.b, self.last = (nn.Conv2d(8, 8, 1) for _ in range(4))
        with torch.no_grad():
            self.first.weight[3] *= 20.0
            for layer in (self.a, self.b):
                layer.weight[:, 3] /= 20.0
            if opposed:
                self.b.weight[:, 3] *= 20.0

    def forward(self, sample: Tensor) -> Tensor:
        x = self.first(sample)
        result: Tensor = self.last(torch.tanh(self.a(x)) + torch.tanh(self.b(x)))
        return result


def prepared_and_data(opposed: bool) -> tuple[PreparedUNet, CalibrationSet, Tensor]:
    sample = torch.randn(64, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    data = CalibrationSet.from_samples([((sample,), {})])
    config = qdiff_fx.QDiffConfig.preset("w8a8", equalize=False, **CONFIG)
    prepared = qdiff_fx.prepare(Shared(opposed).eval(), config, example_inputs=(sample[:2],))
    qdiff_fx.calibrate(prepared, data, holdout=data)
    return prepared, data, sample


@pytest.mark.parametrize("opposed", [False, True])
def test_a_step_of_its_own_only_where_it_pays(opposed: bool) -> None:
    prepared, data, _ = prepared_and_data(opposed)
    before = len(input_units(prepared.graph_module))
    choices = choose_channel_factors(prepared.graph_module, prepared.signature, data)
    assert any(choice.own_step for choice in choices) == opposed
    assert len(input_units(prepared.graph_module)) == before + sum(choice.own_step for choice in choices)


def test_own_steps_survive_conversion_and_show_in_the_report() -> None:
    prepared, data, sample = prepared_and_data(opposed=True)
    choose_channel_factors(prepared.graph_module, prepared.signature, data)
    quantized = qdiff_fx.convert(prepared, backend="reference")
    with torch.no_grad():
        assert sqnr_db(prepared(sample), quantized(sample)) > 50.0
    report = quantized.lowering_report()
    assert report.extra_quantize_steps == 1
    assert "1 tensor is quantized more than once" in str(report)


def test_a_step_of_its_own_without_factors_forgets_the_shared_ones() -> None:
    """At 4 bits "off" wins small gains: a layer may leave a tensor that has factors for a grid without any."""
    sample = torch.randn(64, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    data = CalibrationSet.from_samples([((sample,), {})])
    module = Shared(opposed=False)
    with torch.no_grad():
        module.first.weight[3] *= 16.0 / 20.0
        module.a.weight[:, 3] *= 20.0 / 16.0
        module.b.weight[:, 3] *= 20.0 * 3.0
    config = qdiff_fx.QDiffConfig.preset("w4a8", equalize=False, **CONFIG)
    prepared = qdiff_fx.prepare(module.eval(), config, example_inputs=(sample[:2],))
    qdiff_fx.calibrate(prepared, data, holdout=data)
    choices = choose_channel_factors(prepared.graph_module, prepared.signature, data)
    assert {(choice.own_step, choice.exponent is None) for choice in choices} >= {(True, True), (False, False)}
    with torch.no_grad():
        assert sqnr_db(prepared(sample), qdiff_fx.convert(prepared, backend="reference")(sample)) > 50.0


def test_the_pass_leaves_alone_what_is_not_shared() -> None:
    prepared, _, _ = prepared_and_data(opposed=True)
    context = PassContext(config=prepared.qdiff_config, signature=prepared.signature)
    nodes = {
        node.name: node for node in prepared.graph_module.graph.nodes if node.target == torch.ops.aten.conv2d.default
    }
    layers = list(nodes.values())
    first = GiveOwnQuantizers((layers[1],)).run(prepared.graph_module, context)
    again = GiveOwnQuantizers((layers[1],)).run(prepared.graph_module, context)
    boundary = GiveOwnQuantizers((layers[0],)).run(prepared.graph_module, context)
    assert first.modified
    assert not again.modified
    assert again.refusals[0].reason == "its quantizer is its own already"
    assert boundary.refusals[0].reason == "its input has no quantizer"
