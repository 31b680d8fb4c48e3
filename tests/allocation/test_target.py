"""target_sqnr: reached by raising layers, resumable, and another target needs no new learning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import nn

import qdiff_fx
from qdiff_fx.allocation.estimate import ErrorEstimate, estimate_errors
from qdiff_fx.allocation.kept_figures import KeptFigures
from qdiff_fx.allocation.target import ranked_raises
from qdiff_fx.allocation.units import input_units, layer_multiplications, weight_units
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.errors import CalibrationError, CheckpointError
from qdiff_fx.stages import fit, layer_input_means, quality, target

FAST = {"weight_observer": "minmax", "activation_observer": "minmax", "equalize": False}


def _calibrate(
    unet: nn.Module, data: CalibrationSet, target_sqnr: float | None, folder: Path | None = None, **options: Any
) -> tuple[qdiff_fx.PreparedUNet, qdiff_fx.CalibrationReport]:
    prepared = qdiff_fx.prepare(unet, qdiff_fx.QDiffConfig.preset("w4a8", target_sqnr=target_sqnr, **FAST))
    return prepared, qdiff_fx.calibrate(prepared, data, checkpoint_dir=folder, **options)


def test_figures_and_learned_rounding_serve_every_target(unet: nn.Module, data: CalibrationSet, tmp_path: Path) -> None:
    learning = qdiff_fx.ReconstructionConfig.preset("fast", weight_iterations=2, activation_iterations=2)
    _, high = _calibrate(unet, data, 30.0, tmp_path, reconstruction=learning)
    assert any(row["reason"].startswith("target:") for row in high.raises)
    figures = json.loads((tmp_path / target.TARGET_FILE).read_text())["figures"]
    assert 2 <= len(figures) <= 12
    blocks = {path: path.stat().st_mtime_ns for path in (tmp_path / "blocks").iterdir()}

    with patch.object(target, "measure_quality", wraps=quality.measure_quality) as measured:
        _, again = _calibrate(unet, data, 30.0, tmp_path, reconstruction=learning)
    assert measured.call_count == 0, "every figure of the bisection is kept"
    assert (again.raises, again.quality) == (high.raises, high.quality)

    _, low = _calibrate(unet, data, 25.0, tmp_path, reconstruction=learning)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "blocks").iterdir()} == blocks, "nothing learned anew"
    assert len(low.raises) <= len(high.raises)
    assert low.quality["median_db"] <= high.quality["median_db"]


def test_networks_are_chosen_on_rows_that_nothing_was_fitted_on(data: CalibrationSet) -> None:
    assert fit.split_selection(data, seed=1) == (data, data), "too few to set some aside"
    with patch.object(fit, "SELECTION_ROWS", 10):
        assert [len(part) for part in fit.split_selection(data, seed=1)] == [48, 10]
    with patch.object(fit, "LEAST_ROWS", 1):
        rows, selection = fit.split_selection(data, seed=1)
        assert fit.split_selection(data, seed=1)[1].fingerprint == selection.fingerprint
    assert len(rows) + len(selection) == len(data) and len(selection) == 5
    assert selection.timesteps == data.timesteps


def test_a_target_is_held_less_its_error(unet: nn.Module, data: CalibrationSet) -> None:
    prepared, _ = _calibrate(unet, data, None)
    means = layer_input_means(prepared, data, progress=False)
    uniform = quality.measure_quality(prepared, data)
    assert uniform.median_error_db() > 0.0
    just = uniform.median_db - 0.9 * target.ONE_SIDED_95 * uniform.median_error_db()
    prepared.qdiff_config = prepared.qdiff_config.replace(target_sqnr=just)
    assert target.meet_target(prepared, data, data, means, None, False), "the median alone would have reached it"


def test_raises_that_remove_equal_error_a_byte_go_by_the_multiplications_of_their_layers(
    prepared: qdiff_fx.PreparedUNet,
) -> None:
    graph_module = prepared.graph_module
    nothing = ErrorEstimate(
        weights={unit.target: dict.fromkeys((unit.quantizer.spec.bits, 8), 0.0) for unit in weight_units(graph_module)},
        inputs={unit.target: 0.0 for unit in input_units(graph_module)},
    )
    by_layer = layer_multiplications(graph_module)
    order = [sum(by_layer[layer] for layer in item.layers) for item in ranked_raises(graph_module, nothing)]
    assert order == sorted(order, reverse=True) and len(set(order)) > 3


def test_an_unreachable_target_names_the_best_figure_and_leaves_nothing_to_convert(
    unet: nn.Module, data: CalibrationSet
) -> None:
    prepared = qdiff_fx.prepare(unet, qdiff_fx.QDiffConfig.preset("w4a8", target_sqnr=99.0, **FAST))
    with pytest.raises(CalibrationError, match=r"target_sqnr=99\.0 dB is out of reach: \d+\.\d dB is the best that"):
        qdiff_fx.calibrate(prepared, data)
    assert not prepared.calibrated
    with pytest.raises(CalibrationError, match="never observed"):
        qdiff_fx.convert(prepared, backend="reference")


def test_figures_survive_a_kill_and_belong_to_one_run(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    figures = KeptFigures(file, "this run", save_every=2)
    figures["a"] = 1.5
    assert not file.exists(), "two figures a write"
    figures["b"] = float("inf")
    again = KeptFigures(file, "this run")
    assert (again["a"], again["b"], "c" in again) == (1.5, float("inf"), False)
    with pytest.raises(CheckpointError, match="belongs to another model, config or calibration set"):
        KeptFigures(file, "another run")
    file.write_text('{"identity": "this run", "figures": {"a": [1]}}')
    with pytest.raises(CheckpointError, match="want a number a key; delete the file"):
        KeptFigures(file, "this run")


def test_raises_go_by_error_a_byte_and_weights_to_the_carrier_stand_among_them(
    prepared: qdiff_fx.PreparedUNet, data: CalibrationSet
) -> None:
    graph_module = prepared.graph_module
    estimate = estimate_errors(graph_module, prepared.signature, data, samples=16)
    worst = next(unit.target for unit in weight_units(graph_module) if unit.quantizer.spec.bits == 4)
    weights = {target: dict(by) for target, by in estimate.weights.items()}
    weights[worst] = {4: 1e3 + 1.0, 8: 1e3}  # 8 bits gain little: what is left must be bought next
    ranked = ranked_raises(graph_module, replace(estimate, weights=weights))
    steps = [(item.kind, item.bits) for item in ranked if item.target == worst]
    assert steps == [("weight", 8), ("weight", None)]
    places = {(item.kind, item.target, item.bits): place for place, item in enumerate(ranked)}
    assert places["weight", worst, None] < len(ranked) / 2
    assert all(item.reason.startswith("target") for item in ranked)
    units = weight_units(graph_module)
    assert {item.target for item in ranked if item.bits is None and item.kind == "weight"} == {u.target for u in units}
    assert {item.target for item in ranked if item.kind == "input"} == {u.target for u in input_units(graph_module)}
    four = [unit.target for unit in units if unit.quantizer.spec.bits == 4]
    assert all(places["weight", target, 8] < places["weight", target, None] for target in four)
