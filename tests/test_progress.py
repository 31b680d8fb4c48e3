"""Long work says how far it is where somebody looks, and is quiet elsewhere."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler

import qdiff_fx
from qdiff_fx.calibration.progress import named_steps, progress_bar
from qdiff_fx.cli import VERBS, main
from qdiff_fx.evaluation import parts_sqnr
from qdiff_fx.evaluation.study import Yardstick
from subjects import PLAIN, unconditional_unet

LONG: tuple[Callable[..., Any], ...] = (
    qdiff_fx.prepare,
    qdiff_fx.CalibrationSet.collect,
    qdiff_fx.CalibrationSet.load,
    qdiff_fx.calibrate,
    qdiff_fx.sensitivity,
    qdiff_fx.convert,
    qdiff_fx.save,
    qdiff_fx.load,
    Yardstick,
    parts_sqnr,
)


@pytest.mark.parametrize("entry", LONG, ids=lambda entry: entry.__qualname__)
def test_every_long_entry_takes_progress_and_decides_by_the_terminal(entry: Callable[..., Any]) -> None:
    assert inspect.signature(entry).parameters["progress"].default is None


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_prints_json_for_machines(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_steps_are_announced_as_they_begin_and_counted_as_they_end(capsys: pytest.CaptureFixture[str]) -> None:
    with named_steps("work", total=2, progress=True) as begin:
        begin("first")
        assert "work:   0%" in (shown := capsys.readouterr().err) and "first" in shown
        begin("second")
        assert "50%" in (shown := capsys.readouterr().err) and "second" in shown
    with progress_bar("more", total=3, progress=False) as bar:
        bar.update(1)
    with named_steps("quiet", total=1, progress=None) as begin:  # a test's stderr is no terminal
        begin("first")
    assert "more" not in (left := capsys.readouterr().err) and "quiet" not in left


def bars(capsys: pytest.CaptureFixture[str], *wanted: str) -> list[str]:
    """Those of `wanted` whose bar was not shown since the last look."""
    err = capsys.readouterr().err
    return [title for title in wanted if not re.search(rf"{title}[^:\n]*: ", err)]


def test_every_stage_from_prepare_to_load_shows_its_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdiff_fx.stages.quality.GUARD_DB", -1e9)  # random weights
    unet = unconditional_unet()
    learn = qdiff_fx.ReconstructionConfig(weight_iterations=2, activation_iterations=2, batch_size=4)
    for progress in (True, None):
        data = qdiff_fx.CalibrationSet.collect(
            unet,
            scheduler=DDIMScheduler(),
            num_inference_steps=2,
            num_timesteps=2,
            samples_per_timestep=10,
            progress=progress,
        )
        missing = bars(capsys, "calibration data")
        prepared = qdiff_fx.prepare(
            unet, qdiff_fx.QDiffConfig.preset("w4a8", **(PLAIN if progress is None else {})), progress=progress
        )
        missing += bars(capsys, "prepare")
        qdiff_fx.calibrate(prepared, data, reconstruction=learn if progress else None, progress=progress)
        missing += bars(
            capsys,
            "attention factors",
            "observe",
            "weights",
            "channel factors",
            "sensitivity",
            "time the blocks",
            "reconstruct, about",
            "quality",
        )
        quantized = qdiff_fx.convert(prepared, backend="reference", progress=progress)
        missing += bars(capsys, "convert", "lower to reference")
        qdiff_fx.save(quantized, tmp_path / "net", progress=progress)
        missing += bars(capsys, "save")
        qdiff_fx.load(tmp_path / "net", backend="reference", progress=progress)
        missing += bars(capsys, "load", "lower to reference")
        assert len(missing) == (0 if progress else 15), missing
