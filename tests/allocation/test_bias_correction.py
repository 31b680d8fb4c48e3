"""Biases make up for what rounding weights does to the mean of every output channel."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qdiff_fx
from node_by_node import largest_errors
from qdiff_fx.allocation.bias_correction import bias_corrections
from qdiff_fx.allocation.estimate import ErrorEstimate, estimate_errors
from qdiff_fx.allocation.factor_errors import Reader, layer_output, output_axes, relative_error
from qdiff_fx.allocation.input_means import input_means
from qdiff_fx.allocation.probe import Probe
from qdiff_fx.allocation.sensitivity import measure_sensitivity
from qdiff_fx.allocation.units import weight_units
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.checks import calibration_set
from qdiff_fx.fake_quantize import BiasCorrection, QuantizerMode, WeightQuantizer
from qdiff_fx.graph.edit import get_tensor, layer_call
from qdiff_fx.model import PreparedUNet
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.prepare.correct_biases import CorrectBiases, bias_correction
from qdiff_fx.passes.prepare.raises import ApplyRaises, Raise
from subjects import PLAIN, Preparer, Sketch, calls_of, sketch_inputs


@pytest.fixture(scope="module")
def data() -> CalibrationSet:
    return calibration_set(calls_of(Sketch()))


@pytest.fixture(scope="module")
def corrected(preparer: Preparer, sketch: nn.Module, data: CalibrationSet) -> PreparedUNet:
    """Calibrated at W4A8: a grouped dilated convolution, a strided one, a conv1d, linears and a split shortcut."""
    prepared = preparer(sketch, qdiff_fx.QDiffConfig.preset("w4a8", **PLAIN), example_inputs=sketch_inputs())
    qdiff_fx.calibrate(prepared, data, holdout=data, progress=False)
    return prepared


class MeanErrors(Probe):
    """Collects, layer by layer, the mean of quantized minus full-precision output on full-precision inputs."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, on_weight=lambda _, __, weight: weight, on_input=lambda _, __, x: x)
        self.plain: dict[str, Tensor] = {}
        self.corrected: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        call = layer_call(n)
        if call is not None and call.weight.op == "call_module":
            quantizer = self.fetch_attr(str(call.weight.target))
            assert isinstance(quantizer, WeightQuantizer)
            x, weight = self.env[call.input], self.env[call.weight]
            error = layer_output(call, x, quantizer.quantized(weight)) - layer_output(call, x, weight)
            self.plain[n.name] = error.mean(dim=output_axes(call, error))
            correction = bias_correction(self.module, n)
            assert correction is not None, n.name
            self.corrected[n.name] = self.plain[n.name] + correction.correction
        return super().run_node(n)


def _corrections(prepared: PreparedUNet, data: CalibrationSet) -> dict[str, Tensor]:
    return bias_corrections(prepared.graph_module, input_means(prepared.graph_module, prepared.signature, data))


def _inputs(prepared: PreparedUNet, data: CalibrationSet) -> tuple[Tensor, ...]:
    args, kwargs = data.gather(torch.arange(len(data)))
    return prepared.signature.flatten(args, kwargs)


@torch.no_grad()
def test_the_mean_of_every_output_channel_is_that_of_full_precision(
    corrected: PreparedUNet, data: CalibrationSet
) -> None:
    errors = MeanErrors(corrected.graph_module)
    corrected.set_mode(QuantizerMode.PASS)
    errors.run(*_inputs(corrected, data))
    assert len(errors.plain) == 9
    for name, plain in errors.plain.items():
        assert float(plain.abs().max()) > 1e-5, name  # there was something to correct
        assert float(errors.corrected[name].abs().max()) < 1e-2 * float(plain.abs().max()), name


def test_full_precision_stays_what_it_was(corrected: PreparedUNet, sketch: nn.Module) -> None:
    args, _ = calls_of(sketch)[1]
    with torch.no_grad():
        difference = corrected.set_mode(QuantizerMode.PASS)(*args) - sketch(*args)
    assert float(difference.abs().max()) < 1e-6  # a split shortcut adds up in another order


def test_the_integer_network_has_the_corrected_biases(corrected: PreparedUNet, sketch: nn.Module) -> None:
    corrected.set_mode(QuantizerMode.QUANTIZE)
    quantized = qdiff_fx.convert(corrected, backend="reference")
    args, kwargs = calls_of(sketch)[1]
    errors = largest_errors(corrected.graph_module, quantized.plan, corrected.signature.flatten(args, kwargs))
    assert len(errors) >= 9
    assert max(errors.values()) < 1e-5


def test_a_layer_without_bias_gets_one(corrected: PreparedUNet) -> None:
    without = [
        node
        for node in corrected.graph_module.graph.nodes
        if (call := layer_call(node)) is not None and call.bias is not None and call.bias_source is None
    ]
    assert len(without) == 2  # the projection behind the attention, and one part of the shortcut


def test_the_config_switches_it_off(preparer: Preparer, sketch: nn.Module, data: CalibrationSet) -> None:
    config = qdiff_fx.QDiffConfig.preset("w4a8", bias_correction=False, **PLAIN)
    prepared = preparer(sketch, config, example_inputs=sketch_inputs())
    assert qdiff_fx.calibrate(prepared, data, holdout=data, progress=False).corrected_biases == 0
    assert not any(isinstance(module, BiasCorrection) for module in prepared.graph_module.modules())


def test_learned_rounding_is_left_as_it_was_learned(corrected: PreparedUNet, data: CalibrationSet) -> None:
    prepared = copy.deepcopy(corrected)
    quantizers = [item for item in prepared.graph_module.modules() if isinstance(item, WeightQuantizer)]
    for quantizer in quantizers[:-1]:
        quantizer.round_up = torch.zeros(())
    found = _corrections(prepared, data)
    assert len(found) == 1


def test_a_raise_drops_the_correction_of_the_former_rounding(corrected: PreparedUNet) -> None:
    prepared = copy.deepcopy(corrected)
    graph_module = prepared.graph_module
    node = next(node for node in graph_module.graph.nodes if node.name == "conv2d_1")
    assert bias_correction(graph_module, node) is not None
    call = layer_call(node)
    assert call is not None and call.bias_source is not None
    own = call.bias_source
    decision = Raise(kind="weight", target=str(call.weight.target), layers=(node.name,), bits=8)
    context = PassContext(config=prepared.qdiff_config, signature=prepared.signature)
    ApplyRaises((decision,)).run(graph_module, context)
    assert bias_correction(graph_module, node) is None
    after = layer_call(node)
    assert after is not None and after.bias is own


def test_correcting_twice_is_correcting_once(corrected: PreparedUNet, data: CalibrationSet) -> None:
    prepared = copy.deepcopy(corrected)
    found = _corrections(prepared, data)
    code = prepared.graph_module.code
    context = PassContext(config=prepared.qdiff_config, signature=prepared.signature)
    assert CorrectBiases(found).run(prepared.graph_module, context).modified
    assert len(prepared.graph_module.code.splitlines()) == len(code.splitlines())
    assert CorrectBiases({}).run(prepared.graph_module, context).modified
    assert not CorrectBiases({}).run(prepared.graph_module, context).modified


def test_calibrating_again_starts_from_the_network_s_own_biases(
    preparer: Preparer, sketch: nn.Module, data: CalibrationSet
) -> None:
    prepared = preparer(sketch, qdiff_fx.QDiffConfig.preset("w4a8", **PLAIN), example_inputs=sketch_inputs())
    first, second = (qdiff_fx.calibrate(prepared, data, holdout=data, progress=False) for _ in range(2))
    assert first.corrected_biases == second.corrected_biases == 9
    assert first.quality == second.quality


def test_the_estimate_does_not_count_what_the_bias_takes_away(corrected: PreparedUNet, data: CalibrationSet) -> None:
    graph_module, signature = corrected.graph_module, corrected.signature
    options: dict[str, Any] = {"samples": 12, "batch_size": 2}
    plain = estimate_errors(graph_module, signature, data, **options)
    centred = estimate_errors(
        graph_module, signature, data, means=input_means(graph_module, signature, data), **options
    )
    report = measure_sensitivity(graph_module, signature, data, samples=12)
    measured = {row.name: row.error for row in report.rows if row.kind == "weight"}

    def distance(estimate: ErrorEstimate) -> float:
        """Sum over the weights of |log(predicted / measured)|; measured is each weight alone, with its correction."""
        return sum(
            abs(math.log(estimate.weights[unit.target][unit.quantizer.spec.bits] / measured[unit.name]))
            for unit in weight_units(graph_module)
        )

    assert distance(centred) < distance(plain)


def test_learned_rounding_is_predicted_with_its_mean(corrected: PreparedUNet, data: CalibrationSet) -> None:
    prepared = copy.deepcopy(corrected)
    graph_module, signature = prepared.graph_module, prepared.signature
    unit = next(unit for unit in weight_units(graph_module) if unit.quantizer.spec.bits == 4)
    unit.quantizer.round_up = torch.rand(unit.weight.shape) < 0.5
    options: dict[str, Any] = {"samples": 12, "batch_size": 2}
    plain = estimate_errors(graph_module, signature, data, **options)
    centred = estimate_errors(
        graph_module, signature, data, means=input_means(graph_module, signature, data), **options
    )
    assert centred.weights[unit.target][4] == pytest.approx(plain.weights[unit.target][4])
    assert centred.weights[unit.target][8] != pytest.approx(plain.weights[unit.target][8], rel=1e-3)


@torch.no_grad()
def test_a_factor_is_not_judged_by_what_the_bias_takes_away(corrected: PreparedUNet) -> None:
    graph_module = corrected.graph_module
    node = next(node for node in graph_module.graph.nodes if node.name == "conv2d_1")
    call = layer_call(node)
    assert call is not None
    quantizer = graph_module.get_submodule(str(call.weight.target))
    assert isinstance(quantizer, WeightQuantizer)
    weight, x = get_tensor(graph_module, call.weight_source.target), torch.ones(4, 8, 8, 8)
    target = layer_output(call, x, weight)
    shifted = [weight + 0.01]  # constant inputs: all of the error is a constant, but for the borders
    errors = {
        centred: float(
            relative_error(
                (Reader(call=call, weight=weight, quantizer=quantizer, centred=centred),), [target], x, shifted
            )
        )
        for centred in (False, True)
    }
    assert 0.0 < errors[True] < 0.2 * errors[False]
