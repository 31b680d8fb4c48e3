"""Observation and grids."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from qdiff_fx.allocation.attention_factors import fold_attention_factors
from qdiff_fx.allocation.channel_factors import FactorChoice
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.driver import fit_activations, fit_weights, observe, reset
from qdiff_fx.config import QDiffConfig
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.graph.memory import row_memory, rows_within
from qdiff_fx.identity import run_identity
from qdiff_fx.model import PreparedUNet
from qdiff_fx.stages.biases import set_corrections
from qdiff_fx.stages.finite import finite_call

logger = logging.getLogger(__name__)

HOLDOUT_SHARE = 0.1

SELECTION_ROWS, LEAST_ROWS = 128, 4
"""So many rows at most are set aside to choose a network by, or so many a timestep if that is more: with 16 in all, the
median of a network that just reached a target of 25 dB was 24.6 dB on other rows."""


@contextmanager
def fitting_anew(prepared: PreparedUNet) -> Iterator[None]:
    """Every quantizer starts from nothing, and ends there too if the block fails: half a fit cannot be converted."""
    _forget(prepared)
    prepared.calibrated, prepared.calibration = False, {}
    try:
        yield
    except BaseException:
        _forget(prepared)
        prepared.set_mode(QuantizerMode.OBSERVE)
        raise
    prepared.calibrated = True


def _forget(prepared: PreparedUNet) -> None:
    reset(prepared.graph_module)
    set_corrections(prepared, {})


def hold_out(data: CalibrationSet, holdout: CalibrationSet | None, seed: int) -> tuple[CalibrationSet, CalibrationSet]:
    """(fit, held): a seeded tenth of the rows, evenly over the timesteps, is used for no fit.

    A set with fewer than ten rows a timestep is too small for that: both are all of it, and the log says so.
    """
    if holdout is not None:
        return data, holdout
    if len(data) * HOLDOUT_SHARE < max(1, len(data.timesteps)):
        logger.warning(
            "%d calibration samples are too few to set a tenth aside: quality is measured on what was fitted", len(data)
        )
        return data, data
    return data.split(HOLDOUT_SHARE, seed=seed)


def compares_networks(config: QDiffConfig, *, learns: bool) -> bool:
    """Whether a run chooses between networks, and so sets rows aside for it (`split_selection`)."""
    return learns or config.target_sqnr is not None


def split_selection(data: CalibrationSet, seed: int) -> tuple[CalibrationSet, CalibrationSet]:
    """(fit, selection): a seeded tenth of the rows, evenly over the timesteps, at most `SELECTION_ROWS`.

    Networks are compared on it while one is chosen: what was learned looks better than it is on the rows that it was
    learned from. More rows only where `LEAST_ROWS` a timestep are more. A set whose tenth is less than those is both,
    but for the limit, and the log says so.
    """
    least = LEAST_ROWS * max(1, len(data.timesteps))
    if len(data) * HOLDOUT_SHARE >= least:
        return data.split(min(HOLDOUT_SHARE, max(SELECTION_ROWS, least) / len(data)), seed=seed)
    logger.warning(
        "%d calibration samples are too few to set a tenth aside: networks are compared on what was fitted", len(data)
    )
    return data, data if len(data) <= SELECTION_ROWS else data.split(SELECTION_ROWS / len(data), seed=seed)[1]


def equalize_attentions(
    prepared: PreparedUNet, data: CalibrationSet, *, progress: bool | None = False
) -> tuple[FactorChoice, ...]:
    """Fold channel factors of attention operands into their projections, before anything is observed."""
    if not prepared.qdiff_config.equalize:
        return ()
    return fold_attention_factors(
        prepared.graph_module, prepared.signature, data, seed=prepared.qdiff_config.seed, progress=progress
    )


def observe_and_fit(
    prepared: PreparedUNet, data: CalibrationSet, batch_size: int, checkpoint_dir: Path | None, progress: bool | None
) -> None:
    """Run `data` through the full-precision network and fix every grid; a killed observation continues.

    Raises: NonFiniteError naming the first layer that makes NaN or infinity.
    """
    prepared.set_mode(QuantizerMode.OBSERVE)
    observe(
        partial(finite_call, prepared, "full-precision"),
        prepared.graph_module,
        data,
        batch_size=rows_at_a_time(prepared, data, batch_size),
        seed=prepared.qdiff_config.seed,
        identity="" if checkpoint_dir is None else run_identity(prepared, data, batch_size),
        checkpoint_dir=checkpoint_dir,
        progress=progress,
    )
    fit_activations(prepared.graph_module)
    fit_weights(prepared.graph_module, progress=progress)


def rows_at_a_time(prepared: PreparedUNet, data: CalibrationSet, wanted: int) -> int:
    """`wanted`, or fewer rows where a forward pass of so many would not fit into memory."""
    args, kwargs = data.gather([0])
    memory = row_memory(prepared.graph_module, prepared.signature.flatten(args, kwargs))
    return rows_within(memory.forward, wanted)
