"""Takes a call of a module apart into batch rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn

from qdiff_fx.calibration.call_form import NUMBER, ROW, WHOLE, CallForm, LeafSpec, dtype_name
from qdiff_fx.errors import InputError

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma")
"""Arguments that are taken for the timestep when none is named."""


@dataclass(frozen=True)
class CallRows:
    """One call taken apart into rows.

    Args:
      form: what the rows have in common.
      leaves: for each leaf [B, *shape]; what belongs to every row is expanded, not copied.
      timesteps: [B] float64; NaN if the call has no timestep.
    """

    form: CallForm
    leaves: tuple[torch.Tensor, ...]
    timesteps: torch.Tensor


def split_call(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    names: Sequence[str] = (),
    timestep: str | int | None = None,
    need_timestep: bool = True,
) -> CallRows:
    """Take a call apart into batch rows. Nothing is copied: the leaves still share the caller's memory.

    The batch is the first dimension of the first tensor of two or more dimensions. Tensors with a first dimension of 1
    are broadcast to it; other tensors and numbers belong to each row.

    Args:
      args, kwargs: tensors, numbers, None, bool, str, and lists, tuples and dicts of them.
      names: parameter names of the positional arguments.
      timestep: name or position of the timestep argument; None looks for one of `TIMESTEP_NAMES`, then for the first
        other tensor or number of at most one dimension.
      need_timestep: raise if none is found.

    Raises: InputError for inputs of other types, no batch, or no timestep; the latter names the candidates.
    """
    found: list[tuple[str, torch.Tensor, bool]] = []
    named = [names[i] if i < len(names) else str(i) for i in range(len(args))]
    args_node = {"tuple": [_flatten(value, name, found) for name, value in zip(named, args, strict=True)]}
    kwargs_node = _flatten(dict(kwargs), "", found)
    batch = _batch_size([value for _, value, is_number in found if not is_number])
    specs, leaves = zip(*(_leaf_rows(name, value, number, batch) for name, value, number in found), strict=True)
    position = _find_timestep(found, [*named, *kwargs], timestep)
    if position is None and (need_timestep or timestep is not None):
        asked = f"{timestep!r}" if timestep is not None else " or ".join(TIMESTEP_NAMES)
        seen = ", ".join(f"{name} {list(value.shape)}" for name, value, _ in found)
        raise InputError(f"no timestep found (looked for {asked}); pass timestep= one of the inputs: {seen}")
    form = CallForm(args=args_node, kwargs=kwargs_node, leaves=specs, timestep=position)
    return CallRows(form, leaves, _timesteps(form, leaves, batch))


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of the module's forward, in order."""
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(x.name for x in parameters if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD))


def _flatten(value: Any, name: str, found: list[tuple[str, torch.Tensor, bool]]) -> dict[str, Any]:
    if isinstance(value, numpy.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return {"value": value}
    if isinstance(value, (int, float)):
        found.append((name, torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64), True))
        return {"leaf": len(found) - 1}
    if isinstance(value, torch.Tensor) and dtype_name(value.dtype) is not None:
        found.append((name, value.detach(), False))
        return {"leaf": len(found) - 1}
    prefix = f"{name}." if name else ""
    if isinstance(value, (list, tuple)):
        nodes = [_flatten(inner, f"{prefix}{i}", found) for i, inner in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": nodes}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, _flatten(inner, f"{prefix}{key}", found)] for key, inner in value.items()]}
    what = f"a {value.dtype} tensor" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    raise InputError(
        f"input {name} is {what}; calibration keeps real tensors, numbers, None, bool, str and lists, tuples and dicts "
        "of them: bind it with functools.partial or wrap the module"
    )


def _batch_size(tensors: Sequence[torch.Tensor]) -> int:
    for least in (2, 1):
        for tensor in tensors:
            if tensor.ndim >= least:
                if len(tensor) == 0:
                    raise InputError(
                        f"an input of shape {list(tensor.shape)} has no rows; call with a batch of 1 or more"
                    )
                return len(tensor)
    raise InputError("the call has no tensor with a batch dimension; a sample is one batch row")


def _leaf_rows(name: str, value: torch.Tensor, is_number: bool, batch: int) -> tuple[LeafSpec, torch.Tensor]:
    dtype = dtype_name(value.dtype)
    assert dtype is not None  # _flatten lets no other in
    if value.ndim > 0 and len(value) in (1, batch):
        return LeafSpec(name=name, kind=ROW, dtype=dtype, shape=tuple(value.shape[1:])), value.expand(
            batch, *value.shape[1:]
        )
    kind = NUMBER if is_number else WHOLE
    return LeafSpec(name=name, kind=kind, dtype=dtype, shape=tuple(value.shape)), value.expand(batch, *value.shape)


def _find_timestep(
    found: Sequence[tuple[str, torch.Tensor, bool]], arguments: Sequence[str], timestep: str | int | None
) -> int | None:
    leaves = {name: i for i, (name, _, _) in enumerate(found)}
    if isinstance(timestep, int):
        timestep = arguments[timestep] if -len(arguments) <= timestep < len(arguments) else str(timestep)
    if timestep is not None:
        return leaves.get(timestep)
    for name in TIMESTEP_NAMES:
        if name in leaves:
            return leaves[name]
    # The first argument is the sample, whatever its shape.
    others = [name for name in arguments[1:] if name in leaves and found[leaves[name]][1].ndim <= 1]
    return leaves[others[0]] if others else None


def _timesteps(form: CallForm, leaves: Sequence[torch.Tensor], batch: int) -> torch.Tensor:
    if form.timestep is None:
        return torch.full((batch,), torch.nan, dtype=torch.float64)
    value = leaves[form.timestep]
    if value.numel() != batch:
        spec = form.leaves[form.timestep]
        raise InputError(
            f"timestep {spec.name} has shape {list(spec.shape)} a row, want one number; name another input"
        )
    timesteps = value.reshape(batch).to("cpu", torch.float64)
    if not bool(timesteps.isfinite().all()):
        raise InputError(f"timestep {form.leaves[form.timestep].name} is not finite; check the sampler")
    return timesteps
