"""Calibration rows of calls that were listed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from qdiff_fx.calibration.call_form import CallForm
from qdiff_fx.calibration.shard import Shard
from qdiff_fx.calibration.split_call import CallRows, split_call
from qdiff_fx.calibration.storage import make_shard
from qdiff_fx.calibration.timesteps import equal_count_bins
from qdiff_fx.errors import InputError


def shards_of_calls(samples: Iterable[Any], timestep: str | int | None, num_timesteps: int | None) -> tuple[Shard, ...]:
    """One shard in memory for each form of call; see `CalibrationSet.from_samples`."""
    if num_timesteps is not None and num_timesteps < 1:
        raise InputError(f"num_timesteps={num_timesteps}: want 1 or more, or None")
    forms: dict[bytes, CallForm] = {}
    grouped: dict[bytes, list[CallRows]] = {}
    for number, sample in enumerate(samples):
        if (
            not (isinstance(sample, tuple) and len(sample) == 2)
            or not isinstance(sample[0], (tuple, list))
            or not isinstance(sample[1], Mapping)
        ):
            raise InputError(f"sample {number} is a {type(sample).__name__}; want (args, kwargs), e.g. ((x, t), {{}})")
        rows = split_call(*sample, timestep=timestep, need_timestep=False)
        forms.setdefault(rows.form.digest, rows.form)
        grouped.setdefault(rows.form.digest, []).append(rows)
    every = torch.cat([rows.timesteps for same in grouped.values() for rows in same]) if grouped else torch.empty(0)
    level = _representatives([x for x in every.tolist() if x == x], num_timesteps)
    shards = []
    for digest, same in grouped.items():
        leaves = [[row for rows in same for row in rows.leaves[i]] for i in range(len(forms[digest].leaves))]
        timesteps = torch.cat([rows.timesteps for rows in same]).tolist()
        binned = torch.tensor([level.get(x, x) for x in timesteps], dtype=torch.float64)
        shards.append(make_shard(forms[digest], binned, leaves))
    return tuple(shards)


def _representatives(timesteps: Sequence[float], num_timesteps: int | None) -> dict[float, float]:
    """The timestep that each one goes by: the middle one of its bin."""
    if num_timesteps is None:
        return {}
    members: dict[int, list[float]] = {}
    for timestep, number in equal_count_bins(timesteps, num_timesteps).items():
        members.setdefault(number, []).append(timestep)
    return {timestep: same[len(same) // 2] for same in members.values() for timestep in same}
