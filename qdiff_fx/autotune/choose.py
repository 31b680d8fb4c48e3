"""The choice by times: what all backends that have one share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.graph.meta import TIMED, LayerTiming

Timings = Mapping[str, LayerTiming]
"""By `Subject.key`."""

MARGIN = 0.95
"""The carrier type must take at most so much of the integers' time: a tie keeps the smaller weight."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Nodes that are decided on together: a layer, linears that read the same codes, an attention.

    Args:
      nodes: of the graph before its layers are lowered.
      key: one line that two subjects share if and only if they take the same time.
      dtype: the carrier type.
      measure: takes the time.
      kernels: names of the integer kernels among which the fastest is looked for; () where there is one.
      margin: see `MARGIN`; None keeps the nodes on integers, whatever the times.
    """

    nodes: tuple[fx.Node, ...]
    key: str
    dtype: torch.dtype
    measure: Callable[[], LayerTiming]
    kernels: tuple[str, ...] = ()
    margin: float | None = MARGIN

    def knows(self, timing: LayerTiming | None) -> bool:
        """Whether `timing` is one of this subject: its fastest kernel is still among those to choose from."""
        return timing is not None and (timing.kernel in self.kernels or not self.kernels)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the times say.

    Args:
      carrier: nodes that are faster in the carrier type, and why.
      kernels: the fastest integer kernel of nodes that have several and stay on integers.
      timings: those that were known, and those taken.
    """

    carrier: Mapping[str, str]
    kernels: Mapping[str, str]
    timings: Timings


def choose(subjects: Iterable[Subject], timings: Timings, *, progress: bool | None = None) -> Choices:
    """Time what `timings` lack, equal subjects once, and take the faster; nodes are marked for the lowering report."""
    units = list(subjects)
    found = dict(timings)
    missing = {unit.key: unit for unit in units if not unit.knows(found.get(unit.key))}
    with progress_bar("autotune", total=len(missing), progress=progress) as bar:
        for key, unit in missing.items():
            found[key] = unit.measure()
            bar.update(1)
    carrier: dict[str, str] = {}
    kernels: dict[str, str] = {}
    for unit in units:
        timing = found[unit.key]
        for node in unit.nodes:
            TIMED.set(node, timing)
            if unit.margin is not None and timing.carrier <= unit.margin * timing.integer:
                name = str(unit.dtype).removeprefix("torch.")
                carrier[node.name] = f"timed {timing.integer:.0f} us on integers, {timing.carrier:.0f} us in {name}"
            elif unit.kernels:
                kernels[node.name] = timing.kernel
    return Choices(carrier=carrier, kernels=kernels, timings=found)
