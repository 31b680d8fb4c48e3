"""The CPU latency page shows what was measured, and operations are counted from what ran."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import latency
import qdiff_fx
from qdiff_fx.kernels import BACKENDS
from roofline import Stopwatch, achieved_gops
from subjects import sketch_inputs

CASE: dict[str, Any] = {
    "isa": "AVX512",
    "amx": False,
    "vnni": True,
    "threads": 1,
    "torch": "2.13",
    "batch": 2,
    "int8_matmul_gops": 400.0,
    "arms": {"w8a8 bf16": {"milliseconds": 10.0, "speed_over_bf16": 1.5, "speed_over_fp32": 3.0, "sqnr_db": 30.0}},
}


def test_the_page_has_a_roofline_and_memory_where_they_were_measured() -> None:
    plain = latency.table({"case": CASE})
    assert "| w8a8 bf16 | 10.0 | 1.50x | 3.00x | 30.0 |" in plain and "GOPS achieved" not in plain
    measured = {"achieved_gops": {"convolutions": 300.0}, "peak_bytes": {"import": 2**29, "w8a8 bf16": 2**30}}
    full = latency.table({"case": CASE | measured})
    assert "| convolutions | 300 | 0.75 |" in full
    assert "| import | 512 | 0 |" in full and "| w8a8 bf16 | 1024 | 512 |" in full


@pytest.mark.skipif(BACKENDS["x86"].unavailable("cpu") is not None, reason="no int8 kernels here")
def test_operations_are_those_of_the_layers_that_ran(sketch: nn.Module, preparer: Any) -> None:
    model = qdiff_fx.convert(preparer.fitted(sketch, "w8a8"), backend="x86")
    sample, timestep = sketch_inputs()
    stopwatch = Stopwatch(model.lowered)
    with torch.no_grad():
        stopwatch.run(*model.signature.flatten((sample, timestep), {}))
    operations = list(stopwatch.operations.items())
    (_, first), *_ = [item for item in operations if item[0][0] == "convolutions"]
    assert first == 2 * (2 * 8 * 8 * 8) * (4 * 9)  # Sketch.wide: [2, 8, 8, 8] from groups of 4 channels, 3x3
    assert {kind for (kind, _), _ in operations} == {"convolutions", "linears"}
    found = achieved_gops(model, {"sample": sample, "timestep": timestep}, repeats=2)
    assert found["convolutions"] > 0 and found["linears"] > 0


def test_a_device_picks_the_script_that_measures_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    monkeypatch.setattr(sys, "argv", ["latency.py", "sd15", "--device", "cuda", "--out", "x.json"])
    latency.on_device()
    monkeypatch.setattr(sys, "argv", ["latency.py", "--device", "cpu", "fashion"])
    latency.on_device()
    assert sys.argv == ["latency.py", "fashion"]
    (command,) = commands
    assert Path(command[1]).is_file() and command[1].endswith("latency_cuda.py")
    assert command[2:] == ["sd15", "--out", "x.json"]
