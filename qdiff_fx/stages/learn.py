"""Block reconstruction."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.driver import activation_quantizers
from qdiff_fx.fake_quantize import ActivationQuantizer
from qdiff_fx.identity import config_digest, digest, model_digest
from qdiff_fx.model import PreparedUNet
from qdiff_fx.numerics.affine import QParams
from qdiff_fx.reconstruction import BlockResult, ReconstructionConfig, reconstruct
from qdiff_fx.stages.quality import measure_quality

logger = logging.getLogger(__name__)


def learn_blocks(
    prepared: PreparedUNet,
    data: CalibrationSet,
    selection: CalibrationSet,
    config: ReconstructionConfig,
    batch_size: int,
    folder: Path | None,
    progress: bool | None,
) -> tuple[BlockResult, ...]:
    """Learn weight rounding and activation steps block by block; finished blocks of a killed run are taken over.

    Learned steps stay only if the network's output on `selection`, rows that nothing was learned from, is at least as
    good with them as with the observers' steps.
    """

    def calls() -> Iterator[tuple[Tensor, ...]]:
        for batch in data.batches(config.batch_size):
            inputs = prepared.signature.flatten(batch.args, batch.kwargs)
            yield tuple(value.to(prepared.device) for value in inputs)

    observed = [(quantizer, quantizer.scale) for _, quantizer in activation_quantizers(prepared.graph_module)]
    results = reconstruct(
        prepared.graph_module,
        prepared.signature.names,
        calls,
        len(data),
        config,
        identity={
            "model": model_digest(prepared),
            "quantization config": config_digest(prepared.qdiff_config),
            "calibration set": digest(f"{data.fingerprint} {batch_size}"),
        },
        checkpoint_dir=None if folder is None else folder / "blocks",
        progress=progress,
    )
    moved = any(result.phase == "activations" and result.kept and result.iterations for result in results)
    if moved and not _better_steps(prepared, selection, observed):
        logger.info("learned steps go back to the observers': the network's output is worse with them")
        return tuple(
            replace(result, kept=False, changed=0.0) if result.phase == "activations" else result for result in results
        )
    return results


def _better_steps(
    prepared: PreparedUNet, selection: CalibrationSet, observed: Sequence[tuple[ActivationQuantizer, Tensor]]
) -> bool:
    """Whether neither pooled nor median SQNR falls by the present steps; if one does, `observed` are put back.

    Each block kept what lowered its own loss on the rows that it learned from, which may be worse for the network
    (docs/decisions/020).
    """
    learned = [(quantizer, quantizer.scale) for quantizer, _ in observed]
    after = measure_quality(prepared, selection)
    _set_steps(observed)
    before = measure_quality(prepared, selection)
    better = after.pooled_db >= before.pooled_db and after.median_db >= before.median_db
    if better:
        _set_steps(learned)
    return better


def _set_steps(steps: Sequence[tuple[ActivationQuantizer, Tensor]]) -> None:
    for quantizer, step in steps:
        quantizer.set_qparams(QParams(step, quantizer.zero_point))
