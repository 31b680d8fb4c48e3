"""What quantizing each unit alone costs: exact figures, order, resumption."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

import qdiff_fx
from qdiff_fx.allocation import sensitivity as module
from qdiff_fx.allocation.sensitivity import PROGRESS_FILE, spearman
from qdiff_fx.allocation.units import input_units, weight_units
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.driver import weight_quantizers
from qdiff_fx.errors import CheckpointError, QDiffWarning
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.model import PreparedUNet
from qdiff_fx.passes.analysis import blocks


def test_every_unit_is_measured_once_worst_first(prepared: PreparedUNet, data: CalibrationSet) -> None:
    report = qdiff_fx.sensitivity(prepared, data, samples=16)
    counts = {kind: len(report.worst(kind, 10**6)) for kind in ("weight", "input", "attention", "block")}
    graph_module = prepared.graph_module
    assert counts["weight"] == len(weight_units(graph_module))
    assert counts["input"] == len(input_units(graph_module))
    assert counts["attention"] > 0
    assert counts["block"] == len(list(blocks(graph_module)))
    errors = [row.error for row in report.rows]
    assert errors == sorted(errors, reverse=True)
    assert report.samples == 16
    assert "weight" in str(report)
    # 8-bit inputs and 4-bit weights of a random net: ranks agree clearly, if not perfectly.
    assert report.rank_correlation["weight"] > 0.8


def test_the_estimate_of_an_attention_is_close_to_what_quantizing_it_alone_does(
    prepared: PreparedUNet, data: CalibrationSet
) -> None:
    report = qdiff_fx.sensitivity(prepared, data, samples=len(data))
    for row in report.worst("attention"):
        assert row.estimate is not None
        # 48 draws leave a relative spread of 20 %; the rest is what the first order leaves out.
        assert 0.5 < row.estimate / row.error < 2.0


def test_a_figure_is_what_quantizing_the_unit_alone_does(prepared: PreparedUNet, data: CalibrationSet) -> None:
    report = qdiff_fx.sensitivity(prepared, data, samples=len(data))
    unit = weight_units(prepared.graph_module)[3]
    args, kwargs = data.gather(torch.arange(len(data)))
    with torch.no_grad():
        reference = prepared.set_mode(QuantizerMode.PASS)(*args, **kwargs).sample
        for module in (unit.quantizer, *unit.corrections):
            module.mode = QuantizerMode.QUANTIZE
        error = prepared(*args, **kwargs).sample - reference
    expected = (error.square().flatten(1).sum(1) / reference.square().flatten(1).sum(1)).mean()
    row = next(row for row in report.rows if row.kind == "weight" and row.name == unit.name)
    assert row.error == pytest.approx(float(expected), rel=1e-3)  # sums in another order and batch


def test_an_uncalibrated_model_is_observed_first(unet: UNet2DModel, data: CalibrationSet) -> None:
    prepared = qdiff_fx.prepare(unet)
    assert qdiff_fx.sensitivity(prepared, data, samples=8).rows[0].error > 0.0


def test_a_killed_run_goes_on_where_it_was(
    prepared: PreparedUNet, data: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = qdiff_fx.sensitivity(prepared, data, samples=8)
    calls = 0
    original = module._error

    def dies_later(*arguments: Any) -> float:
        nonlocal calls
        calls += 1
        if calls > 25:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, "_error", dies_later)
    with pytest.raises(KeyboardInterrupt):
        qdiff_fx.sensitivity(prepared, data, samples=8, checkpoint_dir=tmp_path)
    calls = -(10**6)
    assert qdiff_fx.sensitivity(prepared, data, samples=8, checkpoint_dir=tmp_path) == whole
    assert calls + 10**6 == len(whole.rows) - 25, "an interrupted run keeps what it measured"


def test_figures_of_another_run_are_refused(prepared: PreparedUNet, data: CalibrationSet, tmp_path: Path) -> None:
    qdiff_fx.sensitivity(prepared, data, samples=8, checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match=PROGRESS_FILE):
        qdiff_fx.sensitivity(prepared, data, samples=4, checkpoint_dir=tmp_path)
    changed = copy.deepcopy(prepared)
    quantizer, _ = next(weight_quantizers(changed.graph_module))
    quantizer.scale = 2.0 * quantizer.scale
    with pytest.raises(CheckpointError, match=PROGRESS_FILE):
        qdiff_fx.sensitivity(changed, data, samples=8, checkpoint_dir=tmp_path)


@pytest.mark.parametrize(("order", "warned"), [("the same", False), ("reversed", True), ("too few to tell", False)])
def test_an_estimate_that_ranks_otherwise_is_warned_of(order: str, warned: bool) -> None:
    count = 4 if order == "too few to tell" else 20
    estimates = [float(i) for i in range(count)]
    errors = estimates if order == "the same" else estimates[::-1]
    rows = tuple(
        module.SensitivityRow(kind="weight", name=str(index), bits=4, error=error, estimate=estimate)
        for index, (error, estimate) in enumerate(zip(errors, estimates, strict=True))
    )
    report = module.SensitivityReport(rows=rows, samples=8, rank_correlation={"weight": spearman(errors, estimates)})
    expected = pytest.warns(QDiffWarning, match=r"is weights -1\.00 \(want 0\.8\); give the worst rows more bits")
    with expected if warned else nullcontext():
        module.warn_of_estimate(report, stacklevel=1)
    assert str(report).endswith(f"rank correlation of allocation's estimate: weights {spearman(errors, estimates):.2f}")


def test_rank_correlation_is_spearmans() -> None:
    assert spearman([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0]) == pytest.approx(0.8)
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
