"""Block reconstruction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.identity import config_digest, digest, model_digest
from qdiff_fx.model import PreparedUNet
from qdiff_fx.reconstruction import BlockResult, ReconstructionConfig, reconstruct


def learn_blocks(
    prepared: PreparedUNet,
    data: CalibrationSet,
    config: ReconstructionConfig,
    batch_size: int,
    folder: Path | None,
    progress: bool | None,
) -> tuple[BlockResult, ...]:
    """Learn weight rounding and activation steps block by block; finished blocks of a killed run are taken over."""

    def calls() -> Iterator[tuple[Tensor, ...]]:
        for batch in data.batches(config.batch_size):
            inputs = prepared.signature.flatten(batch.args, batch.kwargs)
            yield tuple(value.to(prepared.device) for value in inputs)

    return reconstruct(
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
