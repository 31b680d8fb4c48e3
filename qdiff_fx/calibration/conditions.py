"""What a trajectory is conditioned on: context and added conditions by row, drawn with one index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qdiff_fx.errors import InputError
from qdiff_fx.safe_io import tensor_bytes


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Keyword inputs of the UNet for N rows, for one or both guidance branches.

    Args:
      conditional: keyword arguments, nested dicts of [N, ...] tensors; empty for an unconditional model.
      unconditional: the same of the other guidance branch, None without guidance. Tensors are [N, ...] or [1, ...].
      rows: N; None if nothing is conditioned on.
    """

    conditional: Mapping[str, Any] = field(default_factory=dict)
    unconditional: Mapping[str, Any] | None = None
    rows: int | None = None

    def branches(self, indices: torch.Tensor, device: torch.device) -> list[dict[str, Any]]:
        """Keyword arguments of the rows `indices`, unconditional branch first as in diffusers."""
        both = [self.conditional] if self.unconditional is None else [self.unconditional, self.conditional]
        return [_map(branch, lambda x: _take(x, indices).to(device)) for branch in both]

    def digest(self) -> str:
        """SHA-256 of all names and values."""
        total = hashlib.sha256()
        for branch in (self.conditional, self.unconditional or {}):
            total.update(b"branch")
            for name, value in _items(branch, ""):
                total.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                total.update(tensor_bytes(value))
        return total.hexdigest()


def gather_conditions(
    *,
    guidance_scale: float,
    encoder_hidden_states: torch.Tensor | None,
    negative_encoder_hidden_states: torch.Tensor | None,
    conditions: Mapping[str, Any] | None,
    negative_conditions: Mapping[str, Any] | None,
    context_size: int | None,
) -> Conditions:
    """The checked conditions of a collection.

    Args:
      guidance_scale: above 1 both branches are made.
      encoder_hidden_states: [N, L, D].
      negative_encoder_hidden_states: [1 or N, L, D].
      conditions: more keyword tensors [N, ...], nested dicts allowed.
      negative_conditions: those that differ in the unconditional branch.
      context_size: D that the model wants, None if it takes no context or several.

    Raises: InputError naming the argument and the remedy.
    """
    guided = guidance_scale > 1.0
    if context_size is not None and encoder_hidden_states is None:
        raise InputError(
            f"the model wants context: pass encoder_hidden_states= [N, L, {context_size}], or a pipeline and prompts="
        )
    if guided and negative_encoder_hidden_states is None and not negative_conditions:
        raise InputError(
            f"guidance_scale={guidance_scale:g} needs both branches: pass encoder_hidden_states= and "
            "negative_encoder_hidden_states= (the empty prompt's), or prompts= with a pipeline, or guidance_scale=1"
        )
    conditional = dict(conditions or {})
    if encoder_hidden_states is not None:
        conditional["encoder_hidden_states"] = encoder_hidden_states
    unconditional: dict[str, Any] | None = None
    if guided:
        unconditional = _merge(conditional, negative_conditions or {})
        if negative_encoder_hidden_states is not None:
            unconditional["encoder_hidden_states"] = negative_encoder_hidden_states
    rows: int | None = None
    for name, value in _items(conditional, ""):
        if not isinstance(value, torch.Tensor) or value.ndim < 1 or len(value) == 0:
            raise InputError(f"{name}: want a tensor [N, ...] with N >= 1, one row for each condition")
        rows = len(value) if rows is None else rows
        if len(value) != rows:
            raise InputError(f"{name} has {len(value)} rows, other conditions {rows}: pass one row for each condition")
    for name, value in _items(unconditional or {}, ""):
        if not isinstance(value, torch.Tensor) or value.ndim < 1 or len(value) not in (1, rows):
            raise InputError(f"{name} of the unconditional branch: want a tensor of 1 or {rows} rows")
    for name in ("encoder_hidden_states", "negative_encoder_hidden_states"):
        context = encoder_hidden_states if name == "encoder_hidden_states" else negative_encoder_hidden_states
        if context is not None and (context.ndim != 3 or context_size not in (None, context.shape[-1])):
            wanted = "D" if context_size is None else str(context_size)
            raise InputError(f"{name} has shape {list(context.shape)}, the model wants [N, L, {wanted}]")
    return Conditions(conditional=conditional, unconditional=unconditional, rows=rows)


def draw_rows(rows: int | None, count: int, generator: torch.Generator) -> torch.Tensor:
    """[count] row indices in random order, each row equally often up to one; zeros if `rows` is None."""
    if rows is None:
        return torch.zeros(count, dtype=torch.int64)
    rounds = [torch.randperm(rows, generator=generator) for _ in range(-(-count // rows))]
    return torch.cat(rounds)[:count]


def _take(value: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    if len(value) == 1:
        return value.expand(len(indices), *value.shape[1:])
    return value[indices.to(value.device)]


def _map(tree: Mapping[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return {key: _map(value, change) if isinstance(value, Mapping) else change(value) for key, value in tree.items()}


def _items(tree: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found += _items(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = base.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged
