"""Error estimates, allocation, channel factors and targets on a tiny UNet."""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel

import qdiff_fx
from qdiff_fx.allocation import factor_search
from qdiff_fx.allocation.allocate import Candidate, allocate, choose, layer_candidates
from qdiff_fx.allocation.channel_factors import FactorChoice, choose_channel_factors
from qdiff_fx.allocation.estimate import ErrorEstimate, error_at, estimate_errors
from qdiff_fx.allocation.factor_search import channel_shifts, smoothing_factor
from qdiff_fx.allocation.input_means import input_means
from qdiff_fx.allocation.target import reach_target
from qdiff_fx.allocation.units import (
    input_units,
    quantized_multiplications,
    total_multiplications,
    weight_units,
)
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.errors import CalibrationError
from qdiff_fx.fake_quantize import QuantizerMode, WeightQuantizer
from qdiff_fx.model import PreparedUNet
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.prepare.raises import ApplyRaises, Raise
from qdiff_fx.stages import quality

UNIFORM = {"weight_slack": 0.0, "activation_slack": 0.0, "equalize": False}


@pytest.fixture(scope="module")
def estimate(calibrated: PreparedUNet, data: CalibrationSet) -> ErrorEstimate:
    return estimate_errors(calibrated.graph_module, calibrated.signature, data, samples=48, batch_size=2)


def exact_error(prepared: PreparedUNet, data: CalibrationSet, quantizer: WeightQuantizer) -> float:
    """Relative output error energy with one weight quantized alone."""
    args, kwargs = data.gather(torch.arange(len(data)))
    with torch.no_grad():
        reference = prepared.set_mode(QuantizerMode.PASS)(*args, **kwargs).sample
        quantizer.mode = QuantizerMode.QUANTIZE
        error = prepared(*args, **kwargs).sample - reference
    energies = error.square().flatten(1).sum(1) / reference.square().flatten(1).sum(1)
    return float(energies.mean())


def test_estimate_ranks_weights_as_quantizing_each_alone_does(
    prepared: PreparedUNet, data: CalibrationSet, estimate: ErrorEstimate
) -> None:
    units = [unit for unit in weight_units(prepared.graph_module) if unit.quantizer.spec.bits == 4]
    exact = torch.tensor([exact_error(prepared, data, unit.quantizer) for unit in units])
    predicted = torch.tensor([estimate.weights[unit.target][4] for unit in units])
    ranks = torch.stack([exact.argsort().argsort().double(), predicted.argsort().argsort().double()])
    # 24 draws leave each estimate a relative spread of about 30 %; layers differ by orders of magnitude.
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.8


def test_estimate_leaves_modes_as_they_were(prepared: PreparedUNet, estimate: ErrorEstimate) -> None:
    modes = [module.mode for module in prepared.graph_module.modules() if hasattr(module, "mode")]
    assert modes
    assert set(modes) == {QuantizerMode.QUANTIZE}


def test_estimate_keeps_no_activations_alive(prepared: PreparedUNet, data: CalibrationSet) -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(item) is torch.Tensor and item.ndim == 4 for item in gc.get_objects())

    graph_module, signature = prepared.graph_module, prepared.signature
    means = input_means(graph_module, signature, data, samples=4)
    estimate_errors(graph_module, signature, data, means=means, samples=4, batch_size=2)  # caches, once
    before = alive()
    estimate_errors(graph_module, signature, data, means=means, samples=8, batch_size=2)
    assert alive() <= before


def test_eight_bits_are_predicted_to_err_less_than_four(prepared: PreparedUNet) -> None:
    for unit in weight_units(prepared.graph_module):
        if unit.quantizer.spec.bits == 4:
            assert error_at(unit, 8).square().sum() < error_at(unit, 4).square().sum()


@pytest.mark.parametrize("slack", [0.0, 0.1, 0.5])
def test_allocation_stays_within_its_slack(prepared: PreparedUNet, estimate: ErrorEstimate, slack: float) -> None:
    before = sum(unit.bytes for unit in weight_units(prepared.graph_module))
    total = total_multiplications(prepared.graph_module)
    inputs = {unit.target: unit for unit in input_units(prepared.graph_module)}
    raises = allocate(prepared.graph_module, estimate, weight_slack=slack, activation_slack=slack)
    context = PassContext(config=prepared.qdiff_config, signature=prepared.signature)
    ApplyRaises(raises).run(prepared.graph_module, context)
    after = sum(unit.bytes for unit in weight_units(prepared.graph_module))
    kept = sum(inputs[item.target].multiplications for item in raises if item.kind == "input")
    assert before <= after <= before * (1 + slack)
    assert kept <= slack * total
    assert bool(raises) == (slack > 0)
    assert all(item.reason for item in raises)


@pytest.fixture(scope="module")
def eight(unet: UNet2DModel, data: CalibrationSet) -> PreparedUNet:
    prepared = qdiff_fx.prepare(unet, qdiff_fx.QDiffConfig.preset("w8a8", **UNIFORM))
    qdiff_fx.calibrate(prepared, data)
    return prepared


@pytest.mark.parametrize(("weight_slack", "activation_slack"), [(0.0, 0.2), (0.3, 0.0), (0.3, 0.2), (1.0, 1.0)])
def test_whole_layers_go_to_the_carrier_type_within_both_slacks(
    eight: PreparedUNet, data: CalibrationSet, weight_slack: float, activation_slack: float
) -> None:
    prepared = copy.deepcopy(eight)
    graph_module = prepared.graph_module
    estimate = estimate_errors(graph_module, prepared.signature, data, samples=16, batch_size=2)
    units = {unit.target: unit for unit in weight_units(graph_module)}
    before, quantized = sum(unit.bytes for unit in units.values()), quantized_multiplications(graph_module)
    total = total_multiplications(graph_module)
    raises = allocate(graph_module, estimate, weight_slack=weight_slack, activation_slack=activation_slack)
    context = PassContext(config=prepared.qdiff_config, signature=prepared.signature)
    ApplyRaises(raises).run(graph_module, context)
    whole = [units[item.target] for item in raises if item.kind == "weight"]
    assert bool(whole) == (weight_slack > 0)
    assert sum(3 * unit.weight.numel() for unit in whole) <= weight_slack * before
    moved = sum(quantized.values()) - sum(quantized_multiplications(graph_module).values())
    assert moved <= activation_slack * total
    left = {unit.target for unit in weight_units(graph_module)}
    assert not left.intersection(unit.target for unit in whole)


def test_a_whole_layer_gains_its_weights_and_its_inputs_error(eight: PreparedUNet, data: CalibrationSet) -> None:
    graph_module = eight.graph_module
    estimate = estimate_errors(graph_module, eight.signature, data, samples=16, batch_size=2)
    own = {unit.name: unit.target for unit in input_units(graph_module) if len(unit.layers) == 1}
    shared = {layer for unit in input_units(graph_module) if len(unit.layers) > 1 for layer in unit.layers}
    assert own
    assert shared
    for candidate in layer_candidates(graph_module, estimate):
        (layer,) = candidate.raised.layers
        expected = estimate.weights[candidate.raised.target][8]
        expected += estimate.inputs[own[layer]] if layer in own else 0.0
        assert candidate.gain == pytest.approx(expected)
        assert layer not in shared or layer not in own


def test_a_choice_that_would_break_the_second_budget_is_passed_over() -> None:
    def candidate(name: str, gain: float, multiplications: int) -> Candidate:
        raised = Raise(kind="weight", target=name, layers=(name,), bits=None)
        return Candidate(raised=raised, gain=gain, cost=10, multiplications=multiplications)

    offered = [candidate("a", 9.0, 30), candidate("b", 2.0, 0), candidate("c", 5.0, 10)]
    assert [item.raised.target for item in choose(offered, 100, 20)] == ["b", "c"]


def test_a_preset_may_have_slacks_of_its_own_and_overrides_win() -> None:
    assert qdiff_fx.QDiffConfig.preset("w8a8").weight_slack == 0.0
    assert qdiff_fx.QDiffConfig.preset("w8a8", weight_slack=0.1).weight_slack == 0.1
    assert qdiff_fx.QDiffConfig.preset("w4a8").weight_slack == qdiff_fx.QDiffConfig().weight_slack


def test_an_input_is_not_raised_where_its_weight_lives_on_a_channel_factor(
    prepared: PreparedUNet, estimate: ErrorEstimate
) -> None:
    unit = max(input_units(prepared.graph_module), key=lambda item: estimate.inputs[item.target])
    weight = next(item for item in weight_units(prepared.graph_module) if item.layers[0] in unit.layers)
    ruined = replace(estimate, without_factor={weight.target: 10.0})
    for given, expected in ((estimate, True), (ruined, False)):
        raises = allocate(prepared.graph_module, given, weight_slack=0.0, activation_slack=1.0)
        assert (unit.target in {item.target for item in raises}) == expected


def test_applying_raises_twice_changes_nothing_the_second_time(prepared: PreparedUNet, estimate: ErrorEstimate) -> None:
    raises = allocate(prepared.graph_module, estimate, weight_slack=0.3, activation_slack=0.3)
    context = PassContext(config=prepared.qdiff_config, signature=prepared.signature)
    assert ApplyRaises(raises).run(prepared.graph_module, context).modified
    assert not ApplyRaises(raises).run(prepared.graph_module, context).modified


def test_greedy_choice_takes_the_densest_that_fit() -> None:
    def candidate(name: str, gain: float, cost: int) -> Candidate:
        return Candidate(raised=Raise(kind="weight", target=name, layers=(name,), bits=8), gain=gain, cost=cost)

    chosen = choose([candidate("a", 1.0, 10), candidate("b", 5.0, 10), candidate("c", 9.0, 100)], budget=20)
    assert [item.raised.target for item in chosen] == ["b", "a"]


def test_calibrate_spends_the_slack_by_default_and_improves_the_output(unet: UNet2DModel, data: CalibrationSet) -> None:
    figures = {}
    for name, changes in {"uniform": UNIFORM, "default": {"weight_slack": 0.3}}.items():
        prepared = qdiff_fx.prepare(unet, qdiff_fx.QDiffConfig.preset("w4a8", **changes))
        report = qdiff_fx.calibrate(prepared, data)
        figures[name] = report.quality["median_db"]
        assert bool(report.raises) == (name == "default")
    assert figures["default"] > figures["uniform"]


def test_factors_and_raises_survive_conversion(unet: UNet2DModel, data: CalibrationSet) -> None:
    config = qdiff_fx.QDiffConfig.preset("w4a8", weight_slack=0.2, activation_slack=0.2)
    prepared = qdiff_fx.prepare(unet, config)
    report = qdiff_fx.calibrate(prepared, data)
    assert any(row["exponent"] is not None for row in report.factors)
    quantized = qdiff_fx.convert(prepared, backend="reference")
    args, kwargs = data.gather(torch.arange(8))
    with torch.no_grad():
        simulated, integer = prepared(*args, **kwargs).sample, quantized(*args, **kwargs).sample
    # The last bit of carrier rounding moves single codes downstream: far below the quantization error itself.
    assert (simulated - integer).square().sum() < 1e-3 * simulated.square().sum()


def test_factors_never_raise_the_error_on_the_samples_they_were_chosen_on(
    prepared: PreparedUNet, data: CalibrationSet
) -> None:
    choices = choose_channel_factors(prepared.graph_module, prepared.signature, data)
    assert choices
    assert all(choice.gain_db >= 0.0 for choice in choices)


def test_four_bit_weights_are_rounded_anew_for_a_clear_gain_only(
    prepared: PreparedUNet, data: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(minimum: float) -> list[FactorChoice]:
        monkeypatch.setattr(factor_search, "REDRAWN_GAIN_DB", minimum)
        twin = copy.deepcopy(prepared)
        narrow = {unit.name for unit in weight_units(twin.graph_module) if unit.quantizer.spec.bits < 8}
        choices = choose_channel_factors(twin.graph_module, twin.signature, data)
        return [item for item in choices if item.exponent is not None and not narrow.isdisjoint(item.layers)]

    assert any(choice.gain_db < 0.5 for choice in chosen(0.0))
    assert all(choice.gain_db >= 0.5 for choice in chosen(0.5))
    assert chosen(99.0) == []


def test_factors_are_judged_again_at_the_widths_that_layers_are_raised_to(
    unet: UNet2DModel, data: CalibrationSet
) -> None:
    prepared = qdiff_fx.prepare(unet, qdiff_fx.QDiffConfig.preset("w4a8", weight_slack=0.5))
    report = qdiff_fx.calibrate(prepared, data)
    raised = {name for row in report.raises if row["kind"] == "weight" for name in row["layers"]}
    named = [name for row in report.factors for name in row["layers"]]
    assert len(named) == len(set(named)), "each layer's tensor stands in the report once"
    factors = {name for row in report.factors if row["exponent"] is not None for name in row["layers"]}
    with_factor = {
        unit.name for unit in weight_units(prepared.graph_module) if unit.quantizer.channel_factor is not None
    }
    assert with_factor <= factors
    small = [row for row in report.factors if 0.0 < row["gain_db"] < factor_search.REDRAWN_GAIN_DB]
    assert any(not raised.isdisjoint(row["layers"]) for row in small), "at 4 bits it would have been refused"


def test_smoothing_factor_has_geometric_mean_one_and_survives_silent_channels() -> None:
    maxima, weights = torch.tensor([0.0, 1.0, 1000.0, 2.0]), torch.tensor([1.0, 0.0, 1.0, 3.0])
    for exponent in (0.0, 0.5, 1.0):
        factor = smoothing_factor(maxima, weights, exponent)
        assert bool((factor > 0).all() and torch.isfinite(factor).all())
        assert float(torch.log2(factor).mean()) == pytest.approx(0.0, abs=1e-5)


def test_shifts_lie_in_two_bits_and_flatten_the_factor() -> None:
    factor = torch.tensor([1.0, 2.0, 4.0, 8.0])
    shifts = channel_shifts(factor)
    assert shifts.tolist()[-1] - shifts.tolist()[1] == 2
    assert int(shifts.max()) <= 3
    flattened = factor * torch.exp2(-shifts.float())
    assert float(flattened.max() / flattened.min()) <= 2.0


def test_target_is_bisected_to_the_shortest_sufficient_prefix() -> None:
    raises = [Raise(kind="weight", target=str(i), layers=(str(i),), bits=8) for i in range(100)]
    result = reach_target(raises, lambda prefix: float(len(prefix)), target_db=37.0)
    assert len(result.raises) == 37
    assert result.evaluations <= 12


def test_unreachable_target_names_the_best_figure() -> None:
    with pytest.raises(CalibrationError, match=r"25\.0 dB is the best"):
        reach_target([], lambda prefix: 25.0, target_db=30.0)


def test_target_sqnr_is_reached_on_samples_that_were_held_out(unet: UNet2DModel, data: CalibrationSet) -> None:
    target = 28.0
    prepared = qdiff_fx.prepare(unet, qdiff_fx.QDiffConfig.preset("w4a8", target_sqnr=target, **UNIFORM))
    report = qdiff_fx.calibrate(prepared, data)
    # Chosen on other samples of the same distribution: within 1 dB on these.
    assert report.quality["median_db"] > target - 1.0
    assert report.raises


def test_a_ruined_network_is_reported_with_figure_layers_and_remedy(unet: UNet2DModel, data: CalibrationSet) -> None:
    config = qdiff_fx.QDiffConfig.preset("w4a8", weight_bits=2, activation_bits=2, **UNIFORM)
    prepared = qdiff_fx.prepare(unet, config)
    named = r"dB of SQNR pooled.*worst timestep.*worst layers and attentions: [^;,]+, [^;,]+, [^;,]+; .*target_sqnr"
    with pytest.warns(qdiff_fx.errors.QDiffWarning, match=named):  # though nothing was to be allocated
        report = qdiff_fx.calibrate(prepared, data)
    assert report.quality["accepted"] is False
    assert {row["name"] for row in report.sensitivity} >= {row["name"] for row in report.layers if row["weight_bits"]}


def test_an_attention_that_is_the_worst_is_named_as_such(
    unet: UNet2DModel, data: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "GUARD_DB", 99.0)
    config = qdiff_fx.QDiffConfig.preset("w8a8", attention_bits=2, softmax_bits=2, **UNIFORM)
    prepared = qdiff_fx.prepare(unet, config)
    with pytest.warns(qdiff_fx.errors.QDiffWarning, match=r"worst layers and attentions: \S*attentions\.\d\S*,"):
        qdiff_fx.calibrate(prepared, data)


def test_bytes_are_spent_up_to_a_limit_and_one_under_the_present_bytes_is_refused(
    unet: UNet2DModel, calibrated: PreparedUNet, data: CalibrationSet
) -> None:
    def codes(prepared: PreparedUNet) -> int:
        return sum(unit.bytes for unit in weight_units(prepared.graph_module))

    present = codes(calibrated)
    limit = int(1.2 * present)
    config = qdiff_fx.QDiffConfig.preset("w4a8", **UNIFORM)
    prepared = qdiff_fx.prepare(unet, config.replace(target_bytes=limit))
    report = qdiff_fx.calibrate(prepared, data)
    assert present < codes(prepared) <= limit
    assert {row["kind"] for row in report.raises} == {"weight"}
    prepared = qdiff_fx.prepare(unet, config.replace(target_bytes=present - 1))
    with pytest.raises(CalibrationError, match=f"target_bytes={present - 1:,}: .* take {present:,} bytes"):
        qdiff_fx.calibrate(prepared, data)
