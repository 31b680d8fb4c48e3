"""The network has the last word on what its blocks learned about activation steps."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from torch import nn

import qdiff_fx
from qdiff_fx.calibration.driver import activation_quantizers
from qdiff_fx.checks import calibration_set
from qdiff_fx.evaluation.quality import SqnrResult
from qdiff_fx.reconstruction import ReconstructionConfig
from qdiff_fx.stages import learn, learn_blocks
from subjects import calls_of


def _quality(pooled: float, median: float) -> SqnrResult:
    return SqnrResult(pooled_db=pooled, median_db=median, by_timestep={0.0: median})


@pytest.mark.parametrize(
    ("with_learned", "with_observed", "kept"),
    [
        ((20.0, 21.0), (19.9, 20.9), True),
        ((20.0, 21.0), (20.0, 21.0), True),
        ((20.5, 20.9), (19.9, 21.0), False),
        ((19.8, 22.0), (19.9, 21.0), False),
    ],
)
def test_steps_go_back_where_the_network_is_worse_with_them(
    calibrated: qdiff_fx.PreparedUNet,
    sketch: nn.Module,
    with_learned: tuple[float, float],
    with_observed: tuple[float, float],
    kept: bool,
) -> None:
    quantizers = [quantizer for _, quantizer in activation_quantizers(calibrated.graph_module)]
    for quantizer in quantizers:
        quantizer.scale *= 1.5  # there is something to learn
    before = [float(quantizer.scale) for quantizer in quantizers]
    seen: list[list[float]] = []

    def measured(*_: Any, **__: Any) -> SqnrResult:
        seen.append([float(quantizer.scale) for quantizer in quantizers])
        return _quality(*(with_learned if len(seen) == 1 else with_observed))

    config = ReconstructionConfig(weight_iterations=0, activation_iterations=5, batch_size=8)
    data = calibration_set(calls_of(sketch, batch=8))
    with patch.object(learn, "measure_quality", measured):
        results = learn_blocks(calibrated, data, data, config, 8, None, False)
    after = [float(quantizer.scale) for quantizer in quantizers]
    assert seen[0] != before and seen[1] == before
    assert after == (seen[0] if kept else before)
    assert any(result.kept and result.iterations for result in results) == kept
