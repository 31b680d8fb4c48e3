"""A quality target: layers are raised until it is reached."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from qdiff_fx.allocation.estimate import estimate_errors
from qdiff_fx.allocation.kept_figures import KeptFigures
from qdiff_fx.allocation.target import MAXIMUM_EVALUATIONS, ranked_raises, reach_target
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.graph.edit import shared_copy
from qdiff_fx.identity import config_digest, digest, state_digest
from qdiff_fx.model import PreparedUNet
from qdiff_fx.passes.prepare.raises import Raise
from qdiff_fx.stages.biases import Means, correct_biases
from qdiff_fx.stages.decide import apply_raises
from qdiff_fx.stages.quality import measure_quality

logger = logging.getLogger(__name__)

ONE_SIDED_95 = 1.645
"""Standard errors that a normal variable falls short of its mean by in one case of twenty."""

TARGET_FILE = "target.json"
"""What calibrate() keeps of its quality target in the checkpoint folder."""


def meet_target(
    prepared: PreparedUNet,
    data: CalibrationSet,
    selection: CalibrationSet,
    means: Means,
    folder: Path | None,
    progress: bool | None,
) -> tuple[Raise, ...]:
    """Raise quantizers until the median SQNR over timesteps on `selection` reaches `config.target_sqnr`.

    Held against it is the lower end of the median's one-sided 95 % interval: other samples are to reach it too, where
    `selection` is no part of what was fitted.
    With a folder the measured figures are kept there: they hold for every target, so a killed run or another target
    measures only what is new.

    Raises: CalibrationError with the best figure if the target is out of reach.
    """
    config = prepared.qdiff_config
    assert config.target_sqnr is not None
    estimate = estimate_errors(
        prepared.graph_module, prepared.signature, data, means=means, seed=config.seed, progress=progress
    )
    ranked = ranked_raises(prepared.graph_module, estimate)
    original = prepared.graph_module
    identity = "" if folder is None else _target_identity(prepared, selection, ranked)
    figures = KeptFigures(None if folder is None else folder / TARGET_FILE, identity)

    bar = progress_bar("target", total=MAXIMUM_EVALUATIONS, progress=progress)

    def measure(raises: Sequence[Raise]) -> float:
        key = str(len(raises))
        if key not in figures:
            prepared.graph_module = shared_copy(original)
            apply_raises(prepared, prepared.graph_module, tuple(raises))
            correct_biases(prepared, means)
            try:
                quality = measure_quality(prepared, selection)
                figures[key] = quality.median_db - ONE_SIDED_95 * quality.median_error_db()
            finally:
                prepared.graph_module = original
        bar.update(1)
        return figures[key]

    with bar:
        result = reach_target(ranked, measure, config.target_sqnr)
    apply_raises(prepared, original, result.raises)
    correct_biases(prepared, means)
    logger.info("target_sqnr reached with %d raises after %d evaluations", len(result.raises), result.evaluations)
    return result.raises


def _target_identity(prepared: PreparedUNet, selection: CalibrationSet, ranked: Sequence[Raise]) -> str:
    """SHA-256 over what the figures of a target depend on: weights, grids, learned rounding, samples and the order."""
    order = digest(" ".join(f"{item.kind} {item.target} {item.bits}" for item in ranked))
    config = config_digest(prepared.qdiff_config)
    state = state_digest(prepared)
    return digest(f"less {ONE_SIDED_95} errors {config} {selection.fingerprint} {order} {state}")
