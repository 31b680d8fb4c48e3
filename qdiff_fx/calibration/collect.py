"""Inputs of the full-precision UNet along its own sampling trajectories."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qdiff_fx.calibration.collection import Collection
from qdiff_fx.calibration.conditions import draw_rows
from qdiff_fx.calibration.non_finite import first_non_finite
from qdiff_fx.calibration.progress import shows_progress
from qdiff_fx.calibration.shard import Shard
from qdiff_fx.calibration.split_call import CallRows, parameter_names, split_call
from qdiff_fx.calibration.storage import INDEX, Index, check_free, make_shard, read_index, remove_unlisted, write_index
from qdiff_fx.calibration.timesteps import select_steps
from qdiff_fx.errors import InputError, NonFiniteError


def collect(collection: Collection, *, path: Path | None, progress: bool | None) -> Index:
    """Run the collection; with `path`, shard by shard into that folder, leaving out what is there already.

    Raises: InputError if `path` holds another collection or something else; CheckpointError if it holds damaged shards.
    """
    request = collection.request()
    steps = _kept_steps(collection)
    branches = 1 if collection.conditions.unconditional is None else 2
    trajectories = -(-collection.samples_per_timestep // branches)
    starts = range(0, trajectories, collection.batch_size)
    shards: list[Shard] = []
    if path is not None:
        finished = _finished(path, request, progress)
        if finished.complete:
            return finished
        shards = list(finished.shards)
    # A batch is one shard, except where the branches differ in form (contexts of two lengths): then it is two.
    forms = max(1, len({shard.form.digest for shard in shards}))
    done = len(shards) // forms
    shards = shards[: done * forms]
    rows = draw_rows(collection.conditions.rows, trajectories, _generator(collection.seed, "conditions"))
    bar = tqdm(
        total=len(starts) * (steps[-1] + 1),
        initial=done * (steps[-1] + 1),
        desc="calibration data",
        unit="step",
        leave=False,
        disable=not shows_progress(progress),
    )
    with bar, _evaluating(collection.unet):
        for number, start in enumerate(starts):
            if number < done:
                continue
            indices = rows[start : start + collection.batch_size]
            shards += _collect_batch(collection, steps, number, start, indices, path, bar)
            if path is not None:
                write_index(path, Index(shards=shards, request=request, complete=False))
    index = Index(metadata=collection.metadata(), shards=shards, request=request)
    if path is not None:
        write_index(path, index)
        remove_unlisted(path, index)
    return index


def fresh_scheduler(scheduler: Any, num_inference_steps: int, device: torch.device) -> Any:
    """A copy of the scheduler, ready for a new trajectory. Raises InputError if it refuses the number of steps."""
    copy = type(scheduler).from_config(scheduler.config)
    try:
        copy.set_timesteps(num_inference_steps, device=device)
    except ValueError as error:
        raise InputError(f"num_inference_steps={num_inference_steps}: {type(scheduler).__name__}: {error}") from error
    return copy


def _kept_steps(collection: Collection) -> tuple[int, ...]:
    """Indices into scheduler.timesteps, ascending.

    Some samplers call the model twice at a timestep (PLMS warm-up, Heun); the last call is on the trajectory proper.
    """
    scheduler = fresh_scheduler(collection.scheduler, collection.num_inference_steps, torch.device("cpu"))
    last_call = {float(timestep): step for step, timestep in enumerate(scheduler.timesteps)}
    calls = sorted(last_call.values())
    chosen = select_steps(collection.strategy, len(calls), collection.num_timesteps, seed=collection.seed)
    return tuple(calls[i] for i in chosen)


def _collect_batch(
    collection: Collection,
    steps: Sequence[int],
    number: int,
    start: int,
    indices: torch.Tensor,
    path: Path | None,
    bar: Any,
) -> list[Shard]:
    """The shards of one batch of trajectories; depends on nothing but the collection and the batch's number."""
    unet, scale = collection.unet, collection.guidance_scale
    parameter = next(unet.parameters())
    device, dtype = parameter.device, parameter.dtype
    generator = _generator(collection.seed, f"batch {number}")
    scheduler = fresh_scheduler(collection.scheduler, collection.num_inference_steps, device)
    step_inputs = inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if "generator" in step_inputs else {}
    names = parameter_names(unet)
    branches = collection.conditions.branches(indices, device)
    kept_branches = collection.conditions.branches(indices, torch.device("cpu"))
    noise = torch.randn(len(indices), *collection.sample_shape, generator=generator)
    sample = noise.to(device, dtype) * scheduler.init_noise_sigma
    kept: dict[bytes, list[CallRows]] = {}
    wanted = set(steps)
    for step, timestep in enumerate(scheduler.timesteps[: steps[-1] + 1]):
        scaled = scheduler.scale_model_input(sample, timestep)
        if step in wanted:
            if not bool(torch.isfinite(scaled).all()):
                raise NonFiniteError(
                    f"the sample at timestep {float(timestep):g} is not finite; check weights and dtype"
                )
            # One copy for both branches; their contexts are the same tensors at every step.
            call = (scaled.to("cpu", copy=True), timestep.to("cpu", copy=True))
            for branch, conditions in enumerate(kept_branches):
                # An odd number of samples keeps one conditional row more.
                both = 2 * (start + len(indices)) <= collection.samples_per_timestep or len(branches) == 1
                count = len(indices) if both or branch == 1 else len(indices) - 1
                if count > 0:
                    rows = _first_rows(split_call(call, conditions, names=names), count)
                    kept.setdefault(rows.form.digest, []).append(rows)
        if step < steps[-1]:
            outputs = [_predict(unet, scaled, timestep, conditions) for conditions in branches]
            output = outputs[0] if len(outputs) == 1 else outputs[0] + scale * (outputs[1] - outputs[0])
            try:
                sample = scheduler.step(output, timestep, sample, **extra, return_dict=False)[0]
            except RuntimeError as error:
                raise InputError(
                    f"{type(scheduler).__name__} cannot step from a sample {list(sample.shape)} with an output "
                    f"{list(output.shape)} ({_first_line(error)}); use CalibrationSet.record around your own sampler"
                ) from error
        bar.update()
    return [_shard(rows, path) for rows in kept.values()]


def _predict(unet: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
    try:
        output = unet(sample, timestep, **conditions)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"batch_size={len(sample)}: out of memory ({_first_line(error)}); lower batch_size="
        ) from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{type(unet).__name__} refused a sample {list(sample.shape)} with {sorted(conditions) or 'no conditions'} "
            f"({_first_line(error)}); pass what it needs as conditions=, or use CalibrationSet.record on your sampler"
        ) from error
    output = output if isinstance(output, torch.Tensor) else output[0]
    assert isinstance(output, torch.Tensor)
    if not bool(torch.isfinite(output).all()):
        layer = first_non_finite(unet, (sample, timestep), conditions) or type(unet).__name__
        raise NonFiniteError(
            f"{layer}: its output at timestep {float(timestep):g} holds NaN or infinity; check its weights, "
            f"and the model's dtype {sample.dtype}"
        )
    return output


def _first_rows(rows: CallRows, count: int) -> CallRows:
    return CallRows(rows.form, tuple(leaf[:count] for leaf in rows.leaves), rows.timesteps[:count])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _shard(parts: Sequence[CallRows], path: Path | None) -> Shard:
    form = parts[0].form
    leaves = [[row for part in parts for row in part.leaves[i]] for i in range(len(form.leaves))]
    return make_shard(form, torch.cat([part.timesteps for part in parts]), leaves, path)


def _finished(path: Path, request: Mapping[str, Any], progress: bool | None) -> Index:
    """What an earlier call with the same request left in `path`, verified; a new, empty index if nothing."""
    if not (path / INDEX).exists():
        check_free(path)
        index = Index(request=request, complete=False)
        write_index(path, index)  # so that a second call knows the folder even if no shard was finished
        return index
    index = read_index(path, verify=True, progress=progress)
    if index.request is None:
        raise InputError(f"path={path}: holds a set that was not made by collect; choose another folder")
    for key in sorted({*request, *index.request}):
        old, new = index.request.get(key), request.get(key)
        if old != new:
            raise InputError(
                f"path={path}: was collected with {key}={old!r:.80}, now {new!r:.80}; choose another folder"
            )
    return index


def _generator(seed: int, purpose: str) -> torch.Generator:
    value = hashlib.sha256(f"qdiff_fx collect {seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(value[:8], "little") >> 1)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every submodule's own mode is restored."""
    modes = [(inner, inner.training) for inner in module.modules()]
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for inner, mode in modes:
            inner.training = mode
