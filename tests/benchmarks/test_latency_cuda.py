"""The GPU benchmark runs from end to end before it meets a GPU: on the CPU, kernels in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATHS = os.pathsep.join(entry for entry in sys.path if entry)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rehearsal_fills_every_cell(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/latency_cuda.py", "tiny", "--rehearse", "--repeats", "1", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": PATHS, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    case = json.loads(out.read_text())["tiny"]
    assert set(case["arms"]) == {"fp16 compile", "torchao int8 dynamic", "w8a8", "w4a8"}
    assert all(arm["milliseconds"] > 0 and arm["speed"] > 0 for arm in case["arms"].values())
    # Other networks than fp16's would agree with it by chance only: to 0 dB.
    assert case["arms"]["w8a8"]["sqnr_db"] > 20 and case["arms"]["w4a8"]["sqnr_db"] > 5
    assert case["layers"]["w8a8"] and all(row["seconds"] > 0 for row in case["layers"]["w4a8"])
    page = out.with_suffix(".md").read_text()
    assert "rehearsal" in page and page.count("| w8a8 |") == 1 and "nan" not in page


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": PATHS, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/latency_cuda.py", "tiny", "--out", str(tmp_path / "results.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "no CUDA GPU" in done.stderr
