"""The cost is measured without learning anything, and too little memory is told before the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qdiff_fx.calibration.driver import activation_quantizers, weight_quantizers
from qdiff_fx.errors import CalibrationError
from qdiff_fx.reconstruction import ReconstructionConfig, estimate
from qdiff_fx.reconstruction.estimate import BlockCost, check_memory, measure_blocks
from qdiff_fx.reconstruction.subgraph import partition

CPU = torch.device("cpu")
COST = BlockCost(name="down.0", weight_step=2.0, activation_step=3.0, forward_row=0.1, row_bytes=1, step_bytes=1)


def test_measuring_learns_nothing_and_covers_every_block(calibrated: Any) -> None:
    units = partition(calibrated.graph_module)
    scales = [quantizer.scale for _, quantizer in activation_quantizers(calibrated.graph_module)]
    call = calibrated.signature.flatten((torch.randn(4, 2, 8, 8), torch.ones(4)), {})
    costs = measure_blocks(calibrated.graph_module, units, calibrated.signature.names, call, ReconstructionConfig())
    assert set(costs) == {unit.index for unit in units if unit.block is not None}
    assert all(
        cost.weight_step > 0 and cost.step_bytes > 0 and cost.row_bytes > 0 and cost.forward_row > 0
        for cost in costs.values()
    )
    assert all(quantizer.round_up is None for quantizer, _ in weight_quantizers(calibrated.graph_module))
    after = [quantizer.scale for _, quantizer in activation_quantizers(calibrated.graph_module)]
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(scales, after, strict=True))


@pytest.mark.parametrize(
    ("row_bytes", "step_bytes", "disk", "setting"),
    [(1, 2000, 10**9, "batch_size"), (100, 500, 10**9, "cache_bytes below 500"), (10**7, 1, 10**6, "checkpoint_dir")],
    ids=["step", "cache", "disk"],
)
def test_what_does_not_fit_names_the_block_and_the_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, row_bytes: int, step_bytes: int, disk: int, setting: str
) -> None:
    monkeypatch.setattr(estimate, "free_memory", lambda device: 1000)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": disk}))
    cost = replace(COST, row_bytes=row_bytes, step_bytes=step_bytes)
    config = ReconstructionConfig(cache_bytes=900)
    with pytest.raises(CalibrationError, match=rf"down\.0.*{setting}"):
        check_memory({0: cost}, 20, config, tmp_path, CPU)


def test_expected_seconds_are_steps_and_four_passes_over_the_rows() -> None:
    config = ReconstructionConfig(weight_iterations=10, activation_iterations=5)
    assert COST.seconds(config, "weights", 100) == pytest.approx(10 * 2.0 + 4 * 100 * 0.1)
    assert COST.seconds(config, "activations", 100) == pytest.approx(5 * 3.0 + 4 * 100 * 0.1)
