"""Which model and scheduler calibration data came from, as plain JSON."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qdiff_fx.errors import CalibrationError, InputError
from qdiff_fx.safe_io import tensor_bytes

_NOISE_PROCESS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "shift",
)


def describe(owner: Any) -> dict[str, Any]:
    """{"class": name, "config": config} of a model or scheduler; an empty config for what is not of diffusers.

    Private config entries are left out: their order changes from run to run.
    """
    config = getattr(owner, "config", None)
    items = config.items() if isinstance(config, Mapping) else ()
    plain = {str(key): _plain(value) for key, value in items if not str(key).startswith("_")}
    return {"class": type(owner).__name__, "config": plain}


def noise_process(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a described scheduler's config that the model was trained with, whatever the sampler."""
    config = scheduler.get("config") or {}
    return {key: config[key] for key in _NOISE_PROCESS if key in config}


def check_scheduler(metadata: Mapping[str, Any], scheduler: Any) -> None:
    """Raise CalibrationError if data with this metadata was collected with another noise process than `scheduler`'s.

    Nothing is known, and nothing checked, of data that was recorded or given as a list.
    """
    recorded = noise_process(metadata.get("scheduler") or {})
    for key, wanted in noise_process(describe(scheduler)).items():
        if key in recorded and recorded[key] != wanted:
            raise CalibrationError(
                f"the calibration set was collected with another scheduler: {key}={recorded[key]!r} there, {wanted!r} "
                f"in this {type(scheduler).__name__}; collect it with the scheduler that the model samples with"
            )


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
