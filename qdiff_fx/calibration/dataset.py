"""Calibration data: rows of a model's inputs, spread over the timesteps of its sampling trajectories."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdiff_fx.calibration.collect import collect as run_collection
from qdiff_fx.calibration.collection import make_collection
from qdiff_fx.calibration.record import Recorder
from qdiff_fx.calibration.row_table import RowTable
from qdiff_fx.calibration.samples import shards_of_calls
from qdiff_fx.calibration.storage import (
    INDEX,
    SHARD_BYTES,
    Index,
    check_free,
    make_shard,
    read_index,
    remove_unlisted,
    write_index,
)
from qdiff_fx.errors import CalibrationError, CheckpointError, InputError
from qdiff_fx.safe_io import tensor_bytes


@dataclass(frozen=True)
class CalibrationBatch:
    """A call of the model: `module(*batch.args, **batch.kwargs)`.

    Args:
      args, kwargs: as the module was called, tensors on the CPU with `size` rows.
      timestep: of all rows; None if the calls have none.
      size: rows.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    timestep: float | None
    size: int


@dataclass(frozen=True, kw_only=True)
class LeafSignature:
    """Name, shape without the batch dimension, and dtype ("float32") of one tensor or number that the model gets."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Recording:
    """What `CalibrationSet.record` yields."""

    _dataset: CalibrationSet | None = None

    @property
    def dataset(self) -> CalibrationSet:
        """The recorded set. Raises CalibrationError before the block has ended well."""
        if self._dataset is None:
            raise CalibrationError("the recording has not ended; read recording.dataset after the with block")
        return self._dataset


class CalibrationSet:
    """Rows of model inputs with their timesteps, in memory or in a folder that is read row by row.

    Made by `collect`, `record`, `from_samples` and `load`; never changed afterwards.
    """

    def __init__(self, index: Index, owner: object = None, table: RowTable | None = None) -> None:
        """The rows of the index's shards.

        Args:
          index: shards and metadata.
          owner: kept alive as long as the set, e.g. the temporary folder of the shards.
          table: a choice of rows; None for all.

        Raises: CalibrationError if there is no row.
        """
        self._index = index
        self._owner = owner
        self._table = RowTable(index.shards) if table is None else table
        if len(self._table) == 0:
            raise CalibrationError("the calibration set is empty; collect or record at least one sample")

    @classmethod
    def collect(
        cls,
        pipe_or_unet: Any,
        *,
        scheduler: Any = None,
        num_inference_steps: int = 100,
        num_timesteps: int = 20,
        samples_per_timestep: int = 256,
        guidance_scale: float = 1.0,
        strategy: str = "uniform",
        encoder_hidden_states: torch.Tensor | None = None,
        negative_encoder_hidden_states: torch.Tensor | None = None,
        conditions: Mapping[str, Any] | None = None,
        negative_conditions: Mapping[str, Any] | None = None,
        prompts: Sequence[str] | None = None,
        sample_shape: Sequence[int] | None = None,
        batch_size: int = 32,
        seed: int = 0,
        path: str | Path | None = None,
        progress: bool | None = None,
    ) -> CalibrationSet:
        """Inputs of the full-precision UNet along its own trajectories: exactly what it sees, at evenly spaced steps.

        The model runs in eval mode without gradients, with a fresh copy of the scheduler; neither is changed.

        Args:
          pipe_or_unet: a diffusers UNet, or anything with `.unet` and `.scheduler`, such as a pipeline.
          scheduler: a diffusers scheduler; needed with a UNet, overrides a pipeline's.
          num_inference_steps: steps of a trajectory.
          num_timesteps: steps kept, 1..num_inference_steps.
          samples_per_timestep: rows kept at each of them, >= 1. With guidance one half of them is unconditional, the
            other conditional, from the same trajectories.
          guidance_scale: g in u + g (c - u); above 1 both branches run and are kept.
          strategy: "uniform" (first and last step included); ablations: "normal" (PTQ4DM), "first", "middle", "last".
          encoder_hidden_states: [N, L, D] contexts, drawn by seed.
          negative_encoder_hidden_states: [1 or N, L, D], of the unconditional branch.
          conditions: more keyword tensors [N, ...] (nested dicts allowed), drawn with the same index.
          negative_conditions: those that differ in the unconditional branch.
          prompts: texts, with a text-to-image pipeline: it encodes them itself for both branches, with whatever else
            it hands to its network (Stable Diffusion XL: pooled embeddings and sizes).
          sample_shape: (C, H, W); None takes it from the UNet's config.
          batch_size: trajectories run at a time; also the size of a stored shard.
          seed: equal seeds and arguments give equal bytes, interrupted or not.
          path: folder for the set; a call with the same arguments goes on where an earlier one stopped. None keeps the
            set in memory.
          progress: show a progress bar; None does if stderr is a terminal.

        Raises: InputError, ConfigError for arguments that do not fit; NonFiniteError if a trajectory diverges;
          CheckpointError for damaged or unwritable files.
        """
        collection = make_collection(
            pipe_or_unet,
            scheduler=scheduler,
            num_inference_steps=num_inference_steps,
            num_timesteps=num_timesteps,
            samples_per_timestep=samples_per_timestep,
            guidance_scale=guidance_scale,
            strategy=strategy,
            encoder_hidden_states=encoder_hidden_states,
            negative_encoder_hidden_states=negative_encoder_hidden_states,
            conditions=conditions,
            negative_conditions=negative_conditions,
            prompts=prompts,
            sample_shape=sample_shape,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
        return cls(run_collection(collection, path=None if path is None else Path(path), progress=progress))

    @classmethod
    @contextmanager
    def record(
        cls,
        module: nn.Module,
        *,
        samples_per_timestep: int,
        num_timesteps: int = 20,
        timestep: str | int | None = None,
        path: str | Path | None = None,
        seed: int = 0,
        memory_budget: int = 2 * 2**30,
    ) -> Iterator[Recording]:
        """Watch `module` while any sampler runs it; `recording.dataset` holds a bounded even share after the block.

            with CalibrationSet.record(pipe.unet, samples_per_timestep=64) as recording:
                pipe("a red coat")
            data = recording.dataset

        Inputs are copied at the call; a sample is one batch row, and inputs without batch dimension belong to each row.

        Args:
          module: full precision; called as `module(...)`.
          samples_per_timestep: rows kept of each timestep, >= 1.
          num_timesteps: while the sampler shows no more distinct timesteps, each gets its share; beyond, bins of
            equally many of the timesteps seen do. At no time more than 4 * num_timesteps * samples_per_timestep rows
            are held.
          timestep: name or position of the argument; None looks for timestep, timesteps, t or sigma, then takes the
            first other tensor or number of at most one dimension.
          path: folder for the set, new or empty; None keeps it in memory, or past the budget in a temporary folder.
          seed: which rows are kept.
          memory_budget: bytes of rows in memory; more go to files.

        Raises: InputError for a module or inputs that cannot be recorded; CalibrationError if there was no call.
        """
        recorder = Recorder(
            module,
            samples_per_timestep=samples_per_timestep,
            num_timesteps=num_timesteps,
            timestep=timestep,
            path=None if path is None else Path(path),
            seed=seed,
            memory_budget=memory_budget,
        )
        recording = Recording()
        with recorder.hooked():
            yield recording
        recording._dataset = cls(*recorder.finish())

    @classmethod
    def from_samples(
        cls,
        samples: Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
        *,
        timestep: str | int | None = None,
        num_timesteps: int | None = None,
    ) -> CalibrationSet:
        """A set of calls that were listed by hand, kept whole and in memory.

        Args:
          samples: (args, kwargs) of each call, of any batch size.
          timestep: as in `record`; calls without timestep are taken too.
          num_timesteps: put the timesteps into this many bins; None keeps them apart.

        Raises: InputError for what is no list of calls; CalibrationError for an empty one.
        """
        return cls(Index(metadata={"source": "samples"}, shards=shards_of_calls(samples, timestep, num_timesteps)))

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True, progress: bool | None = None) -> CalibrationSet:
        """The set that `save`, `collect` or `record` left in the folder `path`; rows stay there until they are used.

        Args:
          path: the folder.
          verify: read every shard through once and compare its SHA-256.
          progress: show a progress bar; None does so on a terminal.

        Raises: CheckpointError if anything is missing, damaged, unfinished or of another version.
        """
        index = read_index(Path(path), verify=verify, progress=progress)
        if not index.complete:
            raise CheckpointError(f"{path}: the collection is unfinished; call collect again with the same arguments")
        return cls(index)

    def save(self, path: str | Path) -> None:
        """Write the set to the folder `path`; a set that is there stays whole until this one is complete.

        Raises: InputError if the folder holds something else; CheckpointError if it cannot be written.
        """
        folder = Path(path)
        if not (folder / INDEX).exists():
            check_free(folder)
        shards = []
        for form, rows in self._table.by_form():
            row_bytes = sum(spec.torch_dtype.itemsize * math.prod(spec.shape) for spec in form.leaves)
            for part in _chunks(rows, max(1, SHARD_BYTES // max(1, row_bytes))):
                leaves = [self._table.leaf(part, leaf) for leaf in range(len(form.leaves))]
                shards.append(make_shard(form, self.row_timesteps[part], leaves, folder))
        index = Index(metadata=self.metadata, shards=shards)
        write_index(folder, index)
        remove_unlisted(folder, index)

    def __len__(self) -> int:
        """Rows."""
        return len(self._table)

    @property
    def metadata(self) -> dict[str, Any]:
        """How the data came about: scheduler, steps, guidance, strategy, seed, model; what is known of it."""
        return dict(self._index.metadata)

    @property
    def row_timesteps(self) -> torch.Tensor:
        """[N] float64, the timestep of each row, or of its bin where a recording saw more than `num_timesteps`."""
        return self._table.timesteps

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """The distinct timesteps, ascending; empty if the calls have none."""
        return tuple(sorted({x for x in self.row_timesteps.tolist() if x == x}))  # NaN differs from itself

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the rows and their order; independent of how they are stored."""
        return hashlib.sha256(tensor_bytes(self._table.digests)).hexdigest()

    @cached_property
    def signature(self) -> tuple[LeafSignature, ...]:
        """What the model is given, in call order; several entries of a name where calls differ."""
        forms = (form for form, _ in self._table.by_form())
        leaves = (LeafSignature(name=x.name, shape=x.shape, dtype=x.dtype) for form in forms for x in form.leaves)
        return tuple(dict.fromkeys(leaves))

    def split(self, fraction: float, seed: int = 0) -> tuple[CalibrationSet, CalibrationSet]:
        """(rest, part): `part` has the given fraction of the rows, drawn evenly from every timestep.

        Raises: InputError if the fraction is outside (0, 1) or leaves one of them empty.
        """
        taken = round(fraction * len(self)) if 0.0 < fraction < 1.0 else 0
        if not 0 < taken < len(self):
            raise InputError(
                f"fraction={fraction} of {len(self)} rows leaves one side empty; want a fraction in (0, 1)"
            )
        generator = torch.Generator().manual_seed(seed)
        in_part = torch.zeros(len(self), dtype=torch.bool)
        seen = 0
        for rows in _groups(self.row_timesteps.tolist()):
            # Cumulative rounding: shares differ by less than one row and add up to `taken`.
            count = round((seen + len(rows)) * taken / len(self)) - round(seen * taken / len(self))
            seen += len(rows)
            in_part[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
        return self._subset(~in_part), self._subset(in_part)

    def batches(self, batch_size: int, *, seed: int | None = None) -> Iterator[CalibrationBatch]:
        """Every row once, in calls of at most `batch_size` rows of one timestep; the timesteps take turns.

        Args:
          batch_size: >= 1.
          seed: shuffles the rows of a timestep and the order of the timesteps; None keeps the order.
        """
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: want 1 or more")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        queues = []
        for rows in _groups(list(zip(self.row_timesteps.tolist(), self._table.keys.tolist(), strict=True))):
            order = rows if generator is None else rows[torch.randperm(len(rows), generator=generator)]
            queues.append(_chunks(order, batch_size))
        for turn in range(max(len(queue) for queue in queues)):
            waiting = [queue[turn] for queue in queues if turn < len(queue)]
            order = (
                torch.arange(len(waiting)) if generator is None else torch.randperm(len(waiting), generator=generator)
            )
            for i in order.tolist():
                yield self._batch(waiting[i])

    def gather(self, indices: torch.Tensor | Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of a call with these rows, whatever their timesteps; the timestep is a [B] tensor.

        Raises: InputError if the rows cannot share a call: shapes differ, or another input without batch dimension.
        """
        rows = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        if len(rows) == 0 or int(rows.min()) < 0 or int(rows.max()) >= len(self):
            raise InputError(f"indices: want one or more in 0..{len(self) - 1}")
        return self._table.mixed_call(rows)

    def _batch(self, rows: torch.Tensor) -> CalibrationBatch:
        timestep = float(self.row_timesteps[rows[0]])
        args, kwargs = self._table.call(rows)
        return CalibrationBatch(args, kwargs, None if math.isnan(timestep) else timestep, len(rows))

    def _subset(self, mask: torch.Tensor) -> CalibrationSet:
        return CalibrationSet(self._index, self._owner, self._table.subset(mask))


def _groups(values: Sequence[Any]) -> list[torch.Tensor]:
    """Row indices by equal value, values in order of first appearance; NaN equals NaN."""
    groups: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        groups.setdefault(repr(value), []).append(row)
    return [torch.tensor(rows) for rows in groups.values()]


def _chunks(rows: torch.Tensor, size: int) -> list[torch.Tensor]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
