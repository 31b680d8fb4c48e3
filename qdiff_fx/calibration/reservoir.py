"""A bounded, even share of a stream of rows over the noise levels that the stream shows."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qdiff_fx.calibration.call_form import CallForm
from qdiff_fx.calibration.split_call import CallRows
from qdiff_fx.calibration.timesteps import equal_count_bins
from qdiff_fx.safe_io import read_tensors, write_tensors


@dataclass(kw_only=True)
class StoredRow:
    """One kept row: its leaves ([1, *shape] each) in memory, or the scratch file that holds them."""

    form: CallForm
    timestep: float
    priority: float
    order: int
    size: int
    values: tuple[torch.Tensor, ...] | None
    file: Path | None = None

    def leaves(self) -> tuple[torch.Tensor, ...]:
        """[1, *shape] for each leaf of the form."""
        if self.values is not None:
            return self.values
        assert self.file is not None
        stored = read_tensors(self.file)
        return tuple(stored[_leaf_name(i)] for i in range(len(self.form.leaves)))


class Reservoir:
    """Keeps `per_level` rows of each distinct timestep, or of each of `levels` bins where there are more timesteps.

    Every row gets a random priority, and the lowest ones of a timestep stay: a uniform sample of the rows seen there,
    also after it was cut (bottom-k sampling; Cohen and Kaplan, PODC 2007). A bin holds equally many of the distinct
    timesteps seen, and takes from each in turn. Bins move while new timesteps appear, so up to `2 * per_level` rows a
    bin survive a cut, and a cut comes when `4 * levels * per_level` rows are held: that many is the most, ever.
    """

    def __init__(
        self, *, levels: int, per_level: int, seed: int, memory_budget: int, scratch: Callable[[], Path]
    ) -> None:
        """An empty reservoir.

        Args:
          levels: bins at most, >= 1.
          per_level: rows of each in the end, >= 1.
          seed: of the priorities.
          memory_budget: bytes of rows in memory; what comes beyond is written to files.
          scratch: gives the folder for them, called once it is needed.
        """
        self._levels = levels
        self._per_level = per_level
        self._generator = torch.Generator().manual_seed(seed)
        self._budget = memory_budget
        self._scratch = scratch
        self._rows: dict[float, list[StoredRow]] = {}  # by timestep, ascending in priority
        self._timesteps: dict[float, None] = {}  # all that were seen, kept or not
        self._forms: dict[bytes, CallForm] = {}
        self.seen = 0
        self.held = 0
        self.bytes_in_memory = 0

    @property
    def timesteps_seen(self) -> int:
        """Distinct timesteps of all rows offered."""
        return len(self._timesteps)

    def offer(self, rows: CallRows) -> None:
        """Show the rows of one call; those that are kept are copied."""
        form = self._forms.setdefault(rows.form.digest, rows.form)
        timesteps = rows.timesteps.tolist()
        priorities = torch.rand(len(timesteps), generator=self._generator, dtype=torch.float64).tolist()
        for row, (timestep, priority) in enumerate(zip(timesteps, priorities, strict=True)):
            self.seen += 1
            self._timesteps[timestep] = None
            here = self._rows.setdefault(timestep, [])
            if len(here) == self._per_level:
                if priority >= here[-1].priority:
                    continue
                self._drop(here.pop())
            if self.held == 4 * self._levels * self._per_level:
                self._cut(2 * self._per_level)
                here = self._rows.setdefault(timestep, [])
            insort(here, self._store(form, rows, row, timestep, priority), key=lambda x: x.priority)

    def finish(self) -> Iterator[tuple[float, StoredRow]]:
        """(timestep of the bin, row), ascending in both, rows of a timestep in order of arrival.

        A bin of several timesteps goes by the middle one of those kept.
        """
        bins = self._cut(self._per_level)
        members: dict[int, list[float]] = {}
        for timestep in sorted(self._rows):
            members.setdefault(bins[timestep], []).append(timestep)
        for timesteps in members.values():
            for timestep in timesteps:
                for row in sorted(self._rows[timestep], key=lambda x: x.order):
                    yield timesteps[len(timesteps) // 2], row

    def _store(self, form: CallForm, rows: CallRows, row: int, timestep: float, priority: float) -> StoredRow:
        values = tuple(leaf[row : row + 1].to("cpu", copy=True).contiguous() for leaf in rows.leaves)
        size = sum(value.nbytes for value in values)
        stored = StoredRow(form=form, timestep=timestep, priority=priority, order=self.seen, size=size, values=values)
        if self.bytes_in_memory + size > self._budget:
            stored.file = self._scratch() / f"row-{self.seen:09d}.safetensors"
            write_tensors(stored.file, {_leaf_name(i): value for i, value in enumerate(values)}, durable=False)
            stored.values = None
        else:
            self.bytes_in_memory += size
        self.held += 1
        return stored

    def _drop(self, row: StoredRow) -> None:
        self.held -= 1
        if row.file is not None:
            row.file.unlink()
        else:
            self.bytes_in_memory -= row.size

    def _cut(self, per_bin: int) -> Mapping[float, int]:
        """Keep at most `per_bin` rows of every bin; returns the bin of each timestep seen."""
        bins = equal_count_bins(self._timesteps, self._levels)
        members: dict[int, list[tuple[int, float, float, StoredRow]]] = {}
        for timestep, rows in self._rows.items():
            ranked = [(rank, row.priority, timestep, row) for rank, row in enumerate(rows)]
            members.setdefault(bins[timestep], []).extend(ranked)
        kept: dict[float, list[StoredRow]] = {}
        for ranked in members.values():
            ranked.sort(key=lambda x: x[:3])  # the best row of each timestep first, then the second ones
            for _, _, timestep, row in ranked[:per_bin]:
                kept.setdefault(timestep, []).append(row)
            for _, _, _, row in ranked[per_bin:]:
                self._drop(row)
        self._rows = kept
        return bins


def _leaf_name(leaf: int) -> str:
    return f"leaf.{leaf:03d}"
