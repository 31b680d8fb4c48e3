"""Which model and scheduler calibration data came from, as plain JSON."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qdiff_fx.errors import InputError
from qdiff_fx.safe_io import tensor_bytes


def describe(owner: Any) -> dict[str, Any]:
    """{"class": name, "config": config} of a model or scheduler; an empty config for what is not of diffusers.

    Private config entries are left out: their order changes from run to run.
    """
    config = getattr(owner, "config", None)
    items = config.items() if isinstance(config, Mapping) else ()
    plain = {str(key): _plain(value) for key, value in items if not str(key).startswith("_")}
    return {"class": type(owner).__name__, "config": plain}


def weights_fingerprint(module: nn.Module) -> str:
    """SHA-256 of names, shapes and up to 8,192 evenly spaced values of every parameter and buffer.

    A sample, because hashing gigabytes at every call would cost more than it protects: any training step changes it.
    """
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            flat = value.detach().reshape(-1)
            total.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            total.update(tensor_bytes(flat[:: max(1, flat.numel() // 4096)]))
    return total.hexdigest()


def refuse_quantized(module: nn.Module) -> None:
    """Raise InputError if `module` is a prepared or quantized model: calibration needs full-precision inputs."""
    stage = getattr(type(module), "qdiff_stage", None)
    if stage in ("prepared", "quantized"):
        raise InputError(f"the module is a {stage} model; calibration data comes from the full-precision original")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity, and DPM-Solver's config has one
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)
