"""Digests that tell whether stored work belongs to this very model, config and data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from torch import Tensor

from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.config import QDiffConfig
from qdiff_fx.model import PreparedUNet
from qdiff_fx.safe_io import tensor_bytes


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def model_digest(prepared: PreparedUNet) -> str:
    """SHA-256 over the graph and its parameters."""
    return tensors_digest(prepared.graph_module.code, prepared.graph_module.named_parameters())


def state_digest(prepared: PreparedUNet) -> str:
    """SHA-256 over the graph, its parameters and what its quantizers hold: grids, factors, learned rounding."""
    return tensors_digest(prepared.graph_module.code, prepared.graph_module.state_dict().items())


def tensors_digest(text: str, tensors: Iterable[tuple[str, Tensor]], *, progress: bool | None = False) -> str:
    """SHA-256 over a text and named tensors: names, shapes, types and values.

    Args:
      progress: show a bar; None does so on a terminal.
    """
    result = hashlib.sha256(text.encode())
    named = list(tensors)
    with progress_bar("identity", total=len(named), progress=progress, unit="tensor") as bar:
        for name, tensor in named:
            result.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            result.update(tensor_bytes(tensor))
            bar.update(1)
    return result.hexdigest()


def config_digest(config: QDiffConfig) -> str:
    """SHA-256 of what a config asks for before the quality target: another target finds the same learned rounding."""
    settings = config.to_dict()
    del settings["target_sqnr"]
    return digest(json.dumps(settings, sort_keys=True))


def run_identity(prepared: PreparedUNet, data: CalibrationSet, batch_size: int) -> str:
    """SHA-256 over what an observation depends on: graph, weights, config, data and order."""
    config = config_digest(prepared.qdiff_config)
    return digest(f"{config} {batch_size} {data.fingerprint} {model_digest(prepared)}")
