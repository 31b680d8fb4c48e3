"""Recording keeps copies of a module's inputs from any sampler, and leaves nothing behind."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import nn

from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.errors import CalibrationError, CheckpointError, InputError


class Model(nn.Module):
    """Adds what it is told; its forward takes what the tests need."""

    def forward(self, sample: torch.Tensor, timestep: Any, context: Any = None, **more: Any) -> torch.Tensor:
        return sample + 1


def _hooks(module: nn.Module) -> int:
    return len(module._forward_pre_hooks)


def test_inputs_are_copied_before_an_in_place_sampler_changes_them() -> None:
    model, x = Model(), torch.zeros(3, 2, 4, 4)
    with CalibrationSet.record(model, samples_per_timestep=8) as recording:
        for t in (2, 1, 0):
            timestep = torch.tensor(t)
            x.add_(model(x, timestep))
            timestep.fill_(-1)
    data = recording.dataset
    assert data.timesteps == (0, 1, 2)
    values = [data.gather((data.row_timesteps == t).nonzero().flatten())[0][0].unique().tolist() for t in (2, 1, 0)]
    assert values == [[0], [1], [3]]
    assert _hooks(model) == 0


def test_kwargs_and_nested_lists_are_kept_as_called() -> None:
    model = Model()
    residuals = [torch.randn(4, 3, 2, 2), (torch.randn(4, 5), 7)]
    with CalibrationSet.record(model, samples_per_timestep=8) as recording:
        model(torch.randn(4, 2, 8), 5, context={"a": torch.randn(4, 6)}, residuals=residuals, mode="full")
    (batch,) = recording.dataset.batches(8)
    assert batch.kwargs["mode"] == "full" and batch.args[1] == 5
    assert torch.equal(batch.kwargs["residuals"][0], residuals[0])
    assert batch.kwargs["residuals"][1][1] == 7
    names = [leaf.name for leaf in recording.dataset.signature]
    assert names == ["sample", "timestep", "context.a", "residuals.0", "residuals.1.0", "residuals.1.1"]


@pytest.mark.parametrize("as_rows", [True, False], ids=["sigma a row", "0-d sigma"])
def test_continuous_noise_levels_fall_into_bins_and_keep_their_values(as_rows: bool) -> None:
    model = Model()
    with CalibrationSet.record(model, samples_per_timestep=6, num_timesteps=5) as recording:
        for i in range(50):
            sigma = torch.tensor(80.0) ** (1 - i / 25)
            model(torch.full((4, 2, 3), float(sigma)), sigma.expand(4) if as_rows else sigma)
    data = recording.dataset
    assert (len(data), len(data.timesteps)) == (30, 5)
    assert [int((data.row_timesteps == t).sum()) for t in data.timesteps] == [6] * 5
    for batch in data.batches(6):
        torch.testing.assert_close(batch.args[0][:, 0, 0], batch.args[1].expand(batch.size))
    if as_rows:
        assert len(list(data.batches(6))) == 5


def test_an_unmodified_pipeline_can_be_recorded(unet: Any) -> None:
    pipeline = DDIMPipeline(unet, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    with CalibrationSet.record(pipeline.unet, samples_per_timestep=3) as recording:
        for _ in range(2):
            pipeline(batch_size=2, num_inference_steps=6, output_type="np")
    data = recording.dataset
    assert (len(data), len(data.timesteps)) == (18, 6)
    assert data.metadata["rows_seen"] == 24
    assert data.metadata["model"]["class"] == "UNet2DModel"
    for batch in data.batches(4):
        unet(*batch.args, **batch.kwargs)


def test_same_seed_keeps_the_same_rows(tmp_path: Path) -> None:
    model = Model()

    def record(seed: int, name: str) -> str:
        with CalibrationSet.record(model, samples_per_timestep=2, seed=seed, path=tmp_path / name) as recording:
            for call in range(12):
                model(torch.full((3, 2), float(call)), torch.tensor(call % 3))
        return recording.dataset.fingerprint

    assert record(0, "a") == record(0, "b") != record(1, "c")
    assert CalibrationSet.load(tmp_path / "a").fingerprint == CalibrationSet.load(tmp_path / "b").fingerprint
    assert (tmp_path / "a" / "index.json").read_bytes() == (tmp_path / "b" / "index.json").read_bytes()


@pytest.mark.parametrize("with_path", [True, False])
def test_past_the_budget_rows_go_to_files_and_nothing_else_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_path: bool
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, path = Model(), tmp_path / "set" if with_path else None
    recordings = []
    for budget in (2**30, 100):
        target = None if path is None or budget > 100 else path
        with CalibrationSet.record(
            model, samples_per_timestep=4, num_timesteps=3, path=target, memory_budget=budget
        ) as recording:
            for call in range(40):
                model(torch.full((2, 5), float(call)), float(call % 8))
        recordings.append(recording)
    assert recordings[0].dataset.fingerprint == recordings[1].dataset.fingerprint
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == (2 if with_path else 1) and files[-1].startswith("rows-")
    assert not list(tmp_path.rglob("*scratch"))
    del recordings, recording
    gc.collect()
    assert len(list(tmp_path.rglob("rows-*"))) == (1 if with_path else 0)


def test_exception_removes_hook_and_files_and_is_not_hidden(tmp_path: Path) -> None:
    model = Model()

    def sample() -> None:
        with CalibrationSet.record(model, samples_per_timestep=4, path=tmp_path / "a", memory_budget=0) as recording:
            recordings.append(recording)
            model(torch.zeros(2, 3), 1)
            raise ZeroDivisionError

    recordings: list[Any] = []
    with pytest.raises(ZeroDivisionError):
        sample()
    assert _hooks(model) == 0
    assert not list((tmp_path / "a").rglob("*"))
    with pytest.raises(CalibrationError, match="after the with block"):
        _ = recordings[0].dataset


def test_failing_to_write_is_one_error_and_removes_scratch_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise CheckpointError("No space left on device")

    monkeypatch.setattr("qdiff_fx.calibration.record.write_index", full)
    with pytest.raises(CheckpointError, match="No space left"):
        _record_calls(tmp_path / "a")
    assert not (tmp_path / "a" / ".scratch").exists()


def _record_calls(path: Path | None, calls: int = 1, model: nn.Module | None = None, **arguments: Any) -> None:
    model = Model() if model is None else model
    with CalibrationSet.record(model, **{"samples_per_timestep": 4, "path": path, "memory_budget": 0} | arguments):
        for _ in range(calls):
            model(torch.zeros(2, 3), 1)


def test_no_call_is_an_error_that_says_what_to_record() -> None:
    with pytest.raises(CalibrationError, match="was not called"):
        _record_calls(None, calls=0)


def test_no_timestep_is_an_error_that_names_the_candidates() -> None:
    model = nn.Bilinear(3, 4, 2)

    def run() -> None:
        with CalibrationSet.record(model, samples_per_timestep=4):
            model(torch.zeros(2, 3), torch.zeros(2, 4))

    with pytest.raises(InputError, match=r"inputs: input1 \[2, 3\], input2 \[2, 4\]"):
        run()
    assert _hooks(model) == 0


def test_used_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something already"):
        _record_calls(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"samples_per_timestep": 0}, "samples_per_timestep=0: want 1 or more"),
        ({"num_timesteps": 0}, "num_timesteps=0: want 1 or more"),
    ],
)
def test_bad_counts_are_refused(arguments: dict[str, int], match: str) -> None:
    with pytest.raises(InputError, match=match):
        _record_calls(None, **arguments)


@pytest.mark.parametrize("stage", ["prepared", "quantized"])
def test_prepared_and_quantized_modules_are_refused(stage: str) -> None:
    quantized = type("Quantized", (Model,), {"qdiff_stage": stage})
    with pytest.raises(InputError, match=f"is a {stage} model"):
        _record_calls(None, model=quantized())


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(InputError, match=r"want the nn\.Module"):
        CalibrationSet.record("unet", samples_per_timestep=1).__enter__()
