"""`qdiff-fx quantize` and the quality of what it makes: refused, repeated with a remedy, reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qdiff_fx.cli import main
from qdiff_fx.cli.quantize import _discard
from subjects import pipeline_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers pipeline folder: unet/ and scheduler/."""
    return pipeline_folder(tmp_path_factory.mktemp("model"))


def test_a_ruined_model_is_not_written_until_it_is_accepted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ruined"
    sizes = ["--steps", "5", "--timesteps", "3", "--samples", "4"]
    command = ["quantize", str(model), "--preset", "w8a8", "--out", str(out), *sizes]
    monkeypatch.setattr("qdiff_fx.stages.quality.GUARD_DB", 1000.0)
    assert main(command) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert "want 1000" in lines[-2]  # the guard's warning: figure, timestep, layers, setting
    assert "repeat the command with --accept-quality" in lines[-1]
    assert not out.exists()

    def must_not_run(*arguments: object, **options: object) -> None:
        raise AssertionError("the kept work must be taken")

    monkeypatch.setattr("qdiff_fx.calibrate", must_not_run)
    assert main([*command, "--accept-quality"]) == 0
    assert (out / "plan.json").exists()
    assert not json.loads((out / "calibration.json").read_text())["quality"]["accepted"]
    assert not (tmp_path / "ruined.work").exists()


def test_the_remedies_of_a_refused_run_take_the_same_work_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a target some samples choose networks and are not fitted; another preset is another config."""
    out = tmp_path / "ruined"
    sizes = ["--steps", "5", "--timesteps", "3", "--samples", "12"]
    command = ["quantize", str(model), "--out", str(out), *sizes]
    monkeypatch.setattr("qdiff_fx.stages.fit.LEAST_ROWS", 1)
    with monkeypatch.context() as patch:
        patch.setattr("qdiff_fx.stages.quality.GUARD_DB", 1000.0)
        assert main([*command, "--preset", "w4a4"]) == 1
        assert main([*command, "--preset", "w8a8"]) == 1
    assert main([*command, "--preset", "w4a4", "--target-sqnr", "30"]) == 0
    assert json.loads((out / "calibration.json").read_text())["quality"]["accepted"]


def test_only_its_own_folders_are_removed_from_the_work_folder(tmp_path: Path) -> None:
    for name, leftover in (("shared", True), ("own", False)):
        work = tmp_path / name
        (work / "built").mkdir(parents=True)
        if leftover:
            (work / "notes.txt").write_text("mine")
        _discard(work)
        assert work.exists() == leftover
        assert not (work / "built").exists()
    assert (tmp_path / "shared" / "notes.txt").read_text() == "mine"


def test_a_target_is_reached_on_the_command_line(model: Path, tmp_path: Path) -> None:
    sizes = ["--steps", "5", "--timesteps", "3", "--samples", "20"]
    out = tmp_path / "out"
    assert main(["quantize", str(model), "--target-sqnr", "42", "--out", str(out), *sizes]) == 0
    document = json.loads((out / "calibration.json").read_text())
    assert document["quality"]["median_db"] > 41.0  # chosen on other samples of the same distribution
    assert any(row["reason"].startswith("target:") for row in document["raises"])
