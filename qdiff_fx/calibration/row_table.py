"""Rows of several shards as one table, and calls made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from qdiff_fx.calibration.call_form import NUMBER, ROW, CallForm, one_row
from qdiff_fx.calibration.shard import Shard
from qdiff_fx.errors import InputError


class RowTable:
    """A choice of rows, in order; leaves are read from the shards when they are asked for."""

    def __init__(self, shards: Sequence[Shard], rows: torch.Tensor | None = None) -> None:
        """Take `rows` ([N] int64, counted through the shards) of `shards`; None takes all."""
        self.shards = tuple(shards)
        counts = torch.tensor([shard.rows for shard in self.shards], dtype=torch.int64)
        self._rows = torch.arange(int(counts.sum())) if rows is None else rows
        shard_of_row = torch.repeat_interleave(torch.arange(len(counts)), counts)
        self._shard = shard_of_row[self._rows]
        self._row_in_shard = self._rows - (counts.cumsum(0) - counts)[self._shard]

    def __len__(self) -> int:
        """Rows."""
        return len(self._rows)

    def subset(self, rows: torch.Tensor) -> RowTable:
        """The table of these rows ([k] int64 or [N] bool)."""
        return RowTable(self.shards, self._rows[rows])

    @cached_property
    def timesteps(self) -> torch.Tensor:
        """[N] float64; NaN for calls without timestep."""
        return torch.cat([shard.timesteps for shard in self.shards])[self._rows]

    @property
    def keys(self) -> torch.Tensor:
        """[N] int64: rows with equal keys can share a call."""
        return torch.cat([shard.keys for shard in self.shards])[self._rows]

    @property
    def digests(self) -> torch.Tensor:
        """[N, 32] uint8: SHA-256 of each row."""
        return torch.cat([shard.digests for shard in self.shards])[self._rows]

    def leaf(self, rows: torch.Tensor, leaf: int) -> torch.Tensor:
        """A copy [k, *shape] of leaf number `leaf` of `rows` ([k] int64), which are of one form."""
        shards, inner = self._shard[rows], self._row_in_shard[rows]
        values: torch.Tensor | None = None
        for number in _distinct(shards):
            here = shards == number
            part = self.shards[number].leaf(leaf, inner[here])
            if values is None:
                values = part.new_empty(len(rows), *part.shape[1:])
            values[here] = part
        assert values is not None
        return values

    def by_form(self) -> Iterator[tuple[CallForm, torch.Tensor]]:
        """Each form and its rows ([k] int64), forms in order of the shards."""
        numbers: dict[bytes, list[int]] = {}
        for number in _distinct(self._shard):
            numbers.setdefault(self.shards[number].form.digest, []).append(number)
        for same in numbers.values():
            yield self.shards[same[0]].form, torch.isin(self._shard, torch.tensor(same)).nonzero().flatten()

    def call(self, rows: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of `rows`, which have equal keys: as the module was called."""
        form = self._form(rows)
        values = [self.leaf(rows, i) for i in range(len(form.leaves))]
        return form.call(
            [x if spec.kind == ROW else one_row(spec, x[0]) for spec, x in zip(form.leaves, values, strict=True)]
        )

    def mixed_call(self, rows: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of `rows`, whatever their timesteps; the timestep becomes a [B] tensor.

        Raises: InputError if shapes differ, or another input without batch dimension.
        """
        form = self._form(rows)
        leaves: list[Any] = []
        for i, spec in enumerate(form.leaves):
            values = self.leaf(rows, i)
            if i == form.timestep and spec.kind != ROW:
                # A python number has no dtype of its own: floats follow torch's default.
                values = values.reshape(len(rows))
                leaves.append(values.float() if spec.kind == NUMBER and values.is_floating_point() else values)
            elif spec.kind == ROW:
                leaves.append(values)
            elif bool((values == values[:1]).all()):
                leaves.append(one_row(spec, values[0]))
            else:
                raise InputError(
                    f"input {spec.name} differs between the rows and has no batch dimension; use batches()"
                )
        return form.call(leaves)

    def _form(self, rows: torch.Tensor) -> CallForm:
        forms = {self.shards[number].form.digest: self.shards[number].form for number in _distinct(self._shard[rows])}
        if len(forms) > 1:
            raise InputError("the rows were calls of different shapes or arguments; use batches()")
        return next(iter(forms.values()))


def _distinct(numbers: torch.Tensor) -> list[int]:
    return sorted(set(numbers.tolist()))
