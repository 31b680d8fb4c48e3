"""Rows that quality is measured on are used by no fit."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qdiff_fx
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.checks import calibration_set
from qdiff_fx.errors import QDiffWarning
from qdiff_fx.stages.fit import hold_out
from subjects import Preparer, sketch_inputs

LEVELS, ROWS = (0.0, 500.0, 999.0), 12
CONFIG = qdiff_fx.QDiffConfig.preset("w4a8", weight_observer="minmax", activation_observer="minmax")


def calls(change: Callable[[Tensor, Tensor], Tensor] = lambda sample, held: sample) -> CalibrationSet:
    """Twelve rows a level; `change` sees the held-out ones' mask."""
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(len(LEVELS) * ROWS, 2, 8, 8, generator=generator)
    levels = torch.tensor(LEVELS).repeat_interleave(ROWS)
    held = hold_out(calibration_set([((samples, levels), {})]), None, CONFIG.seed)[1]
    rows = held.gather(torch.arange(len(held)))[0][0]
    mask = (samples[:, None] == rows[None]).flatten(2).all(2).any(1)
    assert int(mask.sum()) == len(held) == round(0.1 * len(samples))
    return calibration_set([((change(samples, mask), levels), {})])


def poisoned(samples: Tensor, held: Tensor) -> Tensor:
    return torch.where(held[:, None, None, None], 100.0 * samples + 7.0, samples)


def fitted(sketch: nn.Module, preparer: Preparer, data: CalibrationSet) -> tuple[dict[str, Tensor], float]:
    """Every number of the calibrated model, and the quality that was told."""
    prepared = preparer(sketch, CONFIG, example_inputs=sketch_inputs())
    report = qdiff_fx.calibrate(prepared, data, progress=False)
    numbers = {name: value.clone() for name, value in prepared.graph_module.state_dict().items()}
    return numbers, float(report.quality["pooled_db"])


def test_poison_in_the_held_out_rows_reaches_no_quantizer(sketch: nn.Module, preparer: Preparer) -> None:
    clean, quality = fitted(sketch, preparer, calls())
    with pytest.warns(QDiffWarning, match="keeps only"):  # quality is measured on them
        other, poisoned_quality = fitted(sketch, preparer, calls(poisoned))
    assert clean.keys() == other.keys() and any("scale" in name for name in clean)
    assert [name for name in clean if not torch.equal(clean[name], other[name])] == []
    assert poisoned_quality < quality


def test_a_set_too_small_to_hold_rows_out_is_fitted_on_whole_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = calls()
    few = CalibrationSet.from_samples([((torch.randn(9, 2, 8, 8), torch.full((9,), level)), {}) for level in LEVELS])
    with caplog.at_level(logging.WARNING, logger="qdiff_fx"):
        assert hold_out(few, None, 0) == (few, few)
        assert hold_out(whole, few, 0) == (whole, few)
        fit, held = hold_out(whole, None, 0)
    assert len(fit) + len(held) == len(whole)
    assert caplog.messages == [
        "27 calibration samples are too few to set a tenth aside: quality is measured on what was fitted"
    ]
