"""What the verbs ask of their arguments: one clear line for each that does not fit, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.driver import check_data
from qdiff_fx.calibration.provenance import check_scheduler
from qdiff_fx.config import QDiffConfig
from qdiff_fx.errors import CalibrationError, ConfigError, ConversionError, InputError, NonFiniteError
from qdiff_fx.model import PreparedUNet, QuantizedUNet
from qdiff_fx.numerics.spec import activation_spec
from qdiff_fx.observers import create_observer
from qdiff_fx.reconstruction import ReconstructionConfig

Calls = CalibrationSet | Iterable[tuple[Sequence[Any], Mapping[str, Any]]]


def check_prepare(unet: Any, config: Any) -> None:
    """Refuse what cannot be prepared: ConfigError, InputError or NonFiniteError."""
    if not isinstance(config, QDiffConfig):
        raise ConfigError(f"config is a {type(config).__name__}: want a QDiffConfig, e.g. QDiffConfig.preset('w4a8')")
    stage = getattr(unet, "qdiff_stage", None)
    if stage is not None:
        raise InputError(f"this model is {stage} already; prepare() takes the original full-precision module")
    if not isinstance(unet, nn.Module):
        inner = getattr(unet, "unet", None)
        if isinstance(inner, nn.Module):
            raise InputError(f"{type(unet).__name__} is a pipeline: pass its network, prepare(pipe.unet)")
        raise InputError(f"prepare() takes an nn.Module, got a {type(unet).__name__}")
    adapted = next((path for path, child in unet.named_modules() if _is_unfused(child)), None)
    if adapted is not None:
        raise InputError(
            f"{adapted} carries an adapter that is not fused into its weight; call pipe.fuse_lora() "
            f"(or unet.fuse_lora()) before prepare(), or unload it"
        )
    training = next((path or type(unet).__name__ for path, child in unet.named_modules() if child.training), None)
    if training is not None:
        raise InputError(f"{training} is in training mode; call .eval() on the whole model before prepare()")
    for observer in (config.weight_observer, config.activation_observer):
        create_observer(observer, activation_spec(8))
    for name, parameter in unet.named_parameters():
        if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(f"{name} holds NaN or infinity; repair the model before prepare()")


def _is_unfused(module: nn.Module) -> bool:
    """Whether this is a layer of an adapter library around the original: it has a base_layer and is not merged."""
    return isinstance(getattr(module, "base_layer", None), nn.Module) and getattr(module, "merged", None) is False


def check_stage(prepared: Any, verb: str) -> None:
    """Raise ConversionError unless `prepared` is what prepare() returned and nothing has consumed it."""
    if isinstance(prepared, PreparedUNet) and prepared.qdiff_stage == "prepared":
        return
    if isinstance(prepared, QuantizedUNet):
        raise ConversionError(f"{verb}() takes what prepare() returned; this model is converted already")
    if isinstance(prepared, PreparedUNet):
        raise ConversionError(f"{verb}(): this model was consumed by convert(release=True); prepare it again")
    raise ConversionError(
        f"{verb}() takes what prepare() returned, got a {type(prepared).__name__}; call prepared = prepare(unet) first"
    )


def calibration_set(data: Any) -> CalibrationSet:
    """`data` itself, or its (args, kwargs) calls as a set.

    Raises: CalibrationError if it is neither, or empty; InputError for a call that is none.
    """
    if isinstance(data, CalibrationSet):
        return data
    if isinstance(data, (torch.Tensor, str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"the calibration data is a {type(data).__name__}: want a CalibrationSet (collect, record or load one) "
            f"or a list of (args, kwargs) calls"
        )
    return CalibrationSet.from_samples(list(data))


def check_calibrate(
    prepared: PreparedUNet, data: Any, holdout: Any, reconstruction: Any, scheduler: Any, batch_size: Any
) -> CalibrationSet:
    """The calibration set that `data` stands for, once every argument of calibrate() fits.

    Raises: ConversionError, InputError, ConfigError or CalibrationError with the argument's name and the remedy.
    """
    check_stage(prepared, "calibrate")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size={batch_size!r}: want a whole number of 1 or more")
    if reconstruction is not None and not isinstance(reconstruction, ReconstructionConfig):
        raise ConfigError(
            f"reconstruction is a {type(reconstruction).__name__}: want a ReconstructionConfig, "
            f"e.g. ReconstructionConfig.preset('fast'), or None"
        )
    if holdout is not None and not isinstance(holdout, CalibrationSet):
        raise CalibrationError(f"holdout is a {type(holdout).__name__}: want a CalibrationSet, or None")
    calls = calibration_set(data)
    for item in (calls,) if holdout is None else (calls, holdout):
        check_data(item, prepared.signature, dict(prepared.config))
        if scheduler is not None:
            check_scheduler(item.metadata, scheduler)
    return calls
