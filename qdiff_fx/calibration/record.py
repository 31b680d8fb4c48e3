"""Records the inputs of any module while a sampler of the user's own runs it."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdiff_fx.calibration.call_form import CallForm
from qdiff_fx.calibration.provenance import describe, refuse_quantized
from qdiff_fx.calibration.reservoir import Reservoir, StoredRow
from qdiff_fx.calibration.shard import Shard
from qdiff_fx.calibration.split_call import parameter_names, split_call
from qdiff_fx.calibration.storage import SHARD_BYTES, Index, check_free, make_shard, write_index
from qdiff_fx.errors import CalibrationError, InputError

_LOGGER = logging.getLogger(__name__)


class TemporaryFolder:
    """A folder that is deleted with its last owner."""

    def __init__(self) -> None:
        """Make the folder where the system keeps temporary files."""
        self.path = Path(tempfile.mkdtemp(prefix="qdiff-calibration-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class Recorder:
    """A running recording of one module; `finish` makes shards of what it kept."""

    def __init__(
        self,
        module: nn.Module,
        *,
        samples_per_timestep: int,
        num_timesteps: int,
        timestep: str | int | None,
        path: Path | None,
        seed: int,
        memory_budget: int,
    ) -> None:
        """Check the arguments of `CalibrationSet.record`; nothing is hooked or written yet. Raises InputError."""
        if not isinstance(module, nn.Module):
            raise InputError(
                f"record got a {type(module).__name__}; want the nn.Module that the sampler calls (pipe.unet)"
            )
        refuse_quantized(module)
        for name, count in (("samples_per_timestep", samples_per_timestep), ("num_timesteps", num_timesteps)):
            if count < 1:
                raise InputError(f"{name}={count}: want 1 or more")
        if path is not None:
            check_free(path)
        self._module = module
        self._names = parameter_names(module)
        self._timestep = timestep
        self._path = path
        self._temporary: TemporaryFolder | None = None
        self._reservoir = Reservoir(
            levels=num_timesteps,
            per_level=samples_per_timestep,
            seed=seed,
            memory_budget=memory_budget,
            scratch=self._scratch,
        )
        self._metadata = {
            "source": "record",
            "model": describe(module),
            "num_timesteps": num_timesteps,
            "samples_per_timestep": samples_per_timestep,
            "seed": seed,
        }

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch the module's calls inside the block. The hook goes and scratch files too if the block raises."""
        # First of all hooks, so that what others do to the inputs is seen by the module alone.
        handle = self._module.register_forward_pre_hook(self._watch, prepend=True, with_kwargs=True)
        try:
            yield
        except BaseException:
            self._remove_scratch()
            raise
        finally:
            handle.remove()

    def finish(self) -> tuple[Index, object]:
        """The recorded rows, and the owner of their temporary folder if they are in one.

        Raises: CalibrationError if the module was never called.
        """
        if self._reservoir.seen == 0:
            raise CalibrationError(
                f"{type(self._module).__name__} was not called while it was recorded; record the very module that the "
                "sampler calls, and call it as module(...), not module.forward(...)"
            )
        metadata = self._metadata | {
            "rows_seen": self._reservoir.seen,
            "timesteps_seen": self._reservoir.timesteps_seen,
        }
        # Without a path the rows are in memory, unless some had to go to a file: then all do.
        temporary = None if self._temporary is None else self._temporary.path
        folder = self._path if self._path is not None else temporary
        try:
            shards = list(shards_of_rows(self._reservoir.finish(), folder))
            index = Index(metadata=metadata, shards=shards)
            if self._path is not None:
                write_index(self._path, index)
        finally:
            self._remove_scratch()
        _LOGGER.info("recorded %d of %d rows", sum(shard.rows for shard in shards), self._reservoir.seen)
        return index, self._temporary

    def _watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._reservoir.offer(split_call(args, kwargs, names=self._names, timestep=self._timestep))

    def _scratch(self) -> Path:
        if self._path is not None:
            return self._path / ".scratch"
        if self._temporary is None:
            self._temporary = TemporaryFolder()
        return self._temporary.path / "scratch"

    def _remove_scratch(self) -> None:
        if self._path is not None or self._temporary is not None:
            shutil.rmtree(self._scratch(), ignore_errors=True)


def shards_of_rows(rows: Iterator[tuple[float, StoredRow]], folder: Path | None) -> Iterator[Shard]:
    """Shards of these (timestep, row) pairs, one form each, in memory or in `folder`."""
    waiting: dict[bytes, list[tuple[float, StoredRow]]] = {}
    sizes: dict[bytes, int] = {}
    for timestep, row in rows:
        digest = row.form.digest
        waiting.setdefault(digest, []).append((timestep, row))
        sizes[digest] = sizes.get(digest, 0) + row.size
        if sizes[digest] >= SHARD_BYTES:
            yield _shard(row.form, waiting.pop(digest), folder)
            sizes[digest] = 0
    for part in waiting.values():
        yield _shard(part[0][1].form, part, folder)


def _shard(form: CallForm, rows: Sequence[tuple[float, StoredRow]], folder: Path | None) -> Shard:
    read = [row.leaves() for _, row in rows]
    leaves = [[values[i][0] for values in read] for i in range(len(form.leaves))]
    return make_shard(form, torch.tensor([timestep for timestep, _ in rows], dtype=torch.float64), leaves, folder)
