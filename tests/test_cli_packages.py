"""`qdiff-fx quantize --aot`: the code fits what was written, and bad names are refused before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

import qdiff_fx
from qdiff_fx.ahead_of_time import stamp
from qdiff_fx.cli import main
from qdiff_fx.kernels import BACKENDS
from subjects import unconditional_unet


@pytest.mark.skipif(BACKENDS["x86"].unavailable("cpu") is not None, reason="no x86 backend here")
def test_quantize_compiles_ahead_of_time_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the code is and does, tests/test_ahead_of_time.py knows."""
    stamps: list[Any] = []
    monkeypatch.setattr("qdiff_fx.cli.quantize.require_packages", lambda: None)
    monkeypatch.setattr("qdiff_fx.model.write_package", lambda lowered, *_, **__: stamps.append(stamp(lowered)))
    monkeypatch.setattr("qdiff_fx.model.read_package", lambda lowered, path: stamps.append(path))
    torch.manual_seed(0)
    model, data, out = (str(tmp_path / name) for name in ("model", "data", "out"))
    unconditional_unet().save_pretrained(f"{model}/unet")
    DDIMScheduler(clip_sample=False).save_pretrained(f"{model}/scheduler")
    assert main(["collect", model, "--out", data, "--steps", "5", "--timesteps", "3", "--samples", "4"]) == 0
    command = ["quantize", model, "--preset", "w8a8", "--calibration", data, "--out", out]
    capsys.readouterr()
    assert main([*command, "--aot", str(tmp_path / "code.so")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "code.so: want the name of a PT2 file" in line
    assert main([*command, "--aot", str(tmp_path / "code.pt2")]) == 0
    assert f"{tmp_path / 'code.pt2'}: its code" in capsys.readouterr().out
    assert stamps == [stamp(qdiff_fx.load(out, "x86").lowered), tmp_path / "code.pt2"]
