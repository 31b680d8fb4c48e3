"""Finished blocks survive: a killed run goes on and ends with the same bits; another run's folder is refused."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qdiff_fx.calibration.driver import activation_quantizers, weight_quantizers
from qdiff_fx.errors import CheckpointError
from qdiff_fx.safe_io import read_tensors

HELPERS = Path(__file__).parents[1] / "helpers"

SCRIPT = """
import sys
import torch
from subjects import Sketch, calls_of, sketch_inputs
import qdiff_fx
from qdiff_fx.calibration.driver import activation_quantizers, weight_quantizers
from qdiff_fx.safe_io import write_tensors
from pathlib import Path

torch.set_num_threads(1)
torch.manual_seed(0)
sketch = Sketch().eval()
prepared = qdiff_fx.prepare(sketch, example_inputs=sketch_inputs())
config = qdiff_fx.ReconstructionConfig(weight_iterations=60, activation_iterations=40, batch_size=8)
qdiff_fx.calibrate(
    prepared, calls_of(sketch, batch=16), reconstruction=config, checkpoint_dir=sys.argv[1], progress=False
)
learned = {f"weight.{i}": q.codes(w) for i, (q, w) in enumerate(weight_quantizers(prepared.graph_module))}
learned |= {f"scale.{i}": q.scale for i, (_, q) in enumerate(activation_quantizers(prepared.graph_module))}
write_tensors(Path(sys.argv[2]), learned)
"""


def _start(folder: Path, result: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), str(result)],
        env=environment,
        cwd=folder.parent,
    )


def _finished(folder: Path) -> int:
    return len([path for path in (folder / "blocks").glob("*-*.json")])


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    process = _start(tmp_path / "whole", tmp_path / "whole.safetensors")
    assert process.wait(timeout=120) == 0
    total = _finished(tmp_path / "whole")
    for after in (1, total // 3, total - 2):  # early, in the middle of the weights, late in the activations
        process = _start(tmp_path / "killed", tmp_path / "killed.safetensors")
        deadline = time.monotonic() + 120
        while _finished(tmp_path / "killed") < after and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert after <= _finished(tmp_path / "killed") < total
    assert _start(tmp_path / "killed", tmp_path / "killed.safetensors").wait(timeout=120) == 0
    whole, killed = (read_tensors(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def _learned(prepared: Any) -> list[torch.Tensor]:
    graph_module = prepared.graph_module
    return [q.codes(w) for q, w in weight_quantizers(graph_module)] + [
        q.scale for _, q in activation_quantizers(graph_module)
    ]


@pytest.mark.parametrize("damage", ["nothing", "lost result", "truncated tensors", "lost tensors"])
def test_finished_blocks_are_not_learned_again_and_damaged_ones_are(
    calibrated: Any, run: Any, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    again = copy.deepcopy(calibrated)
    first = run(calibrated, folder=tmp_path)
    victim = sorted(tmp_path.glob("weights-*.json"))[3]
    if damage == "lost result":
        victim.unlink()
    elif damage == "truncated tensors":
        path = victim.with_suffix(".safetensors")
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "lost tensors":
        victim.with_suffix(".safetensors").unlink()
    second = run(again, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(_learned(calibrated), _learned(again), strict=True))
    # Wall time tells what ran again: it is never the same twice.
    repeated = [new.name for old, new in zip(first, second, strict=True) if old.seconds != new.seconds]
    assert len(repeated) == (damage != "nothing")
    assert ("reconstructed again" in caplog.text) == damage.endswith("tensors")


def test_rounding_of_another_grid_is_learned_again(
    calibrated: Any, run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Codes are floor(W m / s_w) + rounding: what was learned on one grid is noise on another."""
    again = copy.deepcopy(calibrated)
    first = run(calibrated, folder=tmp_path)
    quantizer = next(item for item, _ in weight_quantizers(again.graph_module) if item.spec.bits <= 4)
    quantizer.scale = quantizer.scale * 1.5
    second = run(again, folder=tmp_path)
    repeated = [new.name for old, new in zip(first, second, strict=True) if old.seconds != new.seconds]
    assert len(repeated) == 1
    assert "its rounding is that of other weight grids; the block is reconstructed again" in caplog.text


@pytest.mark.parametrize(
    ("identity", "changes", "reason"),
    [
        ({"model": "b", "calibration set": "c"}, {}, "another model"),
        ({"model": "a", "calibration set": "d"}, {}, "another calibration set"),
        ({"model": "a", "calibration set": "c"}, {"seed": 7}, "another reconstruction config"),
    ],
    ids=["model", "data", "config"],
)
def test_another_run_s_folder_is_refused_with_the_reason(
    calibrated: Any, run: Any, tmp_path: Path, identity: Any, changes: Any, reason: str
) -> None:
    run(calibrated, folder=tmp_path, identity={"model": "a", "calibration set": "c"}, weight_iterations=1)
    with pytest.raises(CheckpointError, match=reason):
        run(calibrated, folder=tmp_path, identity=identity, **{"weight_iterations": 1, **changes})
