"""Integer kernels: operator schemas, their reference, and the table of backends."""

from collections.abc import Mapping
from typing import Any

import torch

from qdiff_fx.errors import BackendError, InputError
from qdiff_fx.kernels import ops as ops  # registers the qdiff:: operators
from qdiff_fx.kernels.backend import Backend
from qdiff_fx.kernels.cuda import CUDA
from qdiff_fx.kernels.openvino import OPENVINO
from qdiff_fx.kernels.qdq import QDQ
from qdiff_fx.kernels.reference import REFERENCE
from qdiff_fx.kernels.x86 import X86

BACKENDS: Mapping[str, Backend] = {
    REFERENCE.name: REFERENCE,
    QDQ.name: QDQ,
    X86.name: X86,
    OPENVINO.name: OPENVINO,
    CUDA.name: CUDA,
}
"""Every backend by name; "auto" takes the first available one of AUTO_ORDER."""

AUTO_ORDER = ("x86", "cuda", "reference")

RIVALS = ("x86", "openvino")
"""Backends for one kind of device: with autotune, "auto" times a step on each and takes the fastest."""


def select_backend(name: str, device: str) -> Backend:
    """The backend called `name`, or the best available one for "auto".

    Raises: BackendError for an unknown name, or one that cannot run on this machine or device, with the reason.
    """
    if name == "auto":
        fitting = (BACKENDS[item] for item in AUTO_ORDER if device in BACKENDS[item].devices)
        return next(item for item in fitting if item.unavailable(device) is None)
    if name not in BACKENDS:
        raise BackendError(f"backend {name!r}: want auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unavailable(device)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run here: {reason}")
    return BACKENDS[name]


def rival_backends(device: str) -> tuple[str, ...]:
    """Those of RIVALS that can run here on `device`, () if there is nothing to choose between."""
    fitting = [name for name in RIVALS if device in BACKENDS[name].devices]
    found = tuple(name for name in fitting if BACKENDS[name].unavailable(device) is None)
    return found if len(found) > 1 else ()


def device_of_map(device_map: Any) -> torch.device:
    """The one device of a `device_map` as pipelines hand it to their parts: a device, or {"": device}.

    Raises: InputError for a map of several parts; BackendError if no tensor can be made there.
    """
    devices = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    if len(dict.fromkeys(devices)) != 1:
        raise InputError(
            f"device_map={device_map!r}: a quantized network lies on one device, whose kernels it is lowered to; "
            f"want a device such as 'cuda:0', or {{'': device}}"
        )
    return usable_device(devices[0])


def usable_device(device: str | torch.device) -> torch.device:
    """`device`, once a tensor could be made there. Raises BackendError with the reason if none can."""
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackendError(
            f"device {str(device)!r} cannot be used here: {reason}; want 'cpu' or a device of this torch"
        ) from error
