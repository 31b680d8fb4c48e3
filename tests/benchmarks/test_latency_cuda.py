"""The GPU benchmark runs from end to end before it meets a GPU: on the CPU, kernels in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import latency_cuda
import latency_cuda_page

ROOT = Path(__file__).resolve().parents[2]
PATHS = os.pathsep.join(entry for entry in sys.path if entry)


ARMS = {"fp16 compile", "torchao int8 dynamic", "w8a8", "w8a8, autotuned", "w4a8", "w4a8, autotuned"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rehearsal_fills_every_cell(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/latency_cuda.py", "tiny", "tiny-xl", "--rehearse", "--repeats", "1"]
    environment = {**os.environ, "PYTHONPATH": PATHS, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(out.read_text())
    for case in (results["tiny"], results["tiny-xl"]):
        assert set(case["arms"]) == ARMS and not case["errors"]
        assert all(arm["milliseconds"] > 0 and arm["speed"] > 0 for arm in case["arms"].values())
        # Other networks than fp16's would agree with it by chance only: to 0 dB.
        assert case["arms"]["w8a8"]["sqnr_db"] > 20 and case["arms"]["w4a8"]["sqnr_db"] > 5
        assert case["layers"]["w8a8"] and all(row["seconds"] > 0 for row in case["layers"]["w4a8"])
        assert "timed" in case["reports"]["w8a8, autotuned"] or "int8 us" in case["reports"]["w8a8, autotuned"]
    page = out.with_suffix(".md").read_text()
    assert "rehearsal" in page and page.count("| w8a8 |") == 2 and "nan" not in page and "failed" not in page


def fake_arm(label: str) -> latency_cuda.Arm:
    if label == "broken":
        raise RuntimeError("no kernel\nfor this")
    result = torch.ones(2)
    return latency_cuda.Arm(
        run=lambda: result,
        result=result,
        weights=2_000_000,
        peak=3_000_000,
        make_seconds=1.0,
        compile_seconds=1.0,
        layers=[],
        report="",
    )


def test_an_arm_that_fails_costs_no_other_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = latency_cuda.Machine(rehearsal=True)
    monkeypatch.setattr(latency_cuda, "stored", lambda *_: tempfile.TemporaryDirectory())
    monkeypatch.setattr(latency_cuda, "load", lambda *_, autotune: "broken" if autotune else "whole")
    monkeypatch.setattr(latency_cuda, "torchao_linears", lambda *_: "whole")
    monkeypatch.setattr(latency_cuda, "made_arm", lambda make, *_: fake_arm(make()))
    case = latency_cuda.measure("tiny", machine, 1)
    broken = {"w8a8, autotuned", "w4a8, autotuned"}
    assert set(case["errors"]) == broken and set(case["arms"]) == ARMS - broken
    assert case["errors"]["w8a8, autotuned"] == "RuntimeError: no kernel\nfor this"
    page = latency_cuda.page({"tiny": case})
    assert "w8a8, autotuned failed: `RuntimeError: no kernel for this`" in page and "| w8a8 |" in page
    # The command says so too, once everything is written.
    monkeypatch.setattr(latency_cuda, "measure", lambda *_: case)
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["latency_cuda.py", "tiny", "--rehearse", "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        latency_cuda.main()
    assert stop.value.code and json.loads(out.read_text())["tiny"]["errors"] and out.with_suffix(".md").exists()


def test_kernels_of_a_profile_are_told_by_kind() -> None:
    kinds = {
        "image_gemm": "integer layers",
        "rescale": "integer layers",
        "attention": "integer attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "fp16 attention",
        "triton_per_fused_native_group_norm_silu_12": "elementwise and reductions",
        "triton_tem_fused_addmm_3": "fp16 and int32 matmuls, convolutions",
        "nvjet_sm90_hsh_80x128_64x8_2x1_v_bz_TNN": "fp16 and int32 matmuls, convolutions",
        "Memset (Unknown)": "others",
    }
    assert {name: latency_cuda_page.kernel_kind(name) for name in kinds} == kinds
    table = latency_cuda_page.kernel_table({"w8a8": {"image_gemm": [193, 2e-3], "Memset (Unknown)": [3, 4e-6]}})
    assert table[-1] == "| w8a8 | 2000 (193) | 0 (0) | 0 (0) | 0 (0) | 0 (0) | 4 (3) | 2004 |"


def test_linears_of_few_rows_are_found_for_torchao() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool) -> torch.Tensor:
            result: torch.Tensor = self.network[1](self.network[0](sample))
            return result

    rows = latency_cuda.linear_rows(Step(), {"sample": torch.ones(3, 5, 4)}, latency_cuda.Machine(rehearsal=True))
    assert rows == {"network.0": 15, "network.1": 15}


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": PATHS, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/latency_cuda.py", "tiny", "--out", str(tmp_path / "results.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "no CUDA GPU" in done.stderr
