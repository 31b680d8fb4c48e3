"""The backend that takes the least time for one step of the network, on the sizes of calibration."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import fx

from qdiff_fx.errors import BackendError
from qdiff_fx.graph.propagate import example_inputs
from qdiff_fx.lowering import LoweringReport

_WARM_UP, _LEAST_RUNS, _MOST_RUNS, _SECONDS = 2, 3, 21, 1.0


def lower_to_fastest(
    plan: fx.GraphModule, names: Sequence[str], lower_to: Callable[[str], tuple[fx.GraphModule, LoweringReport]]
) -> tuple[fx.GraphModule, LoweringReport]:
    """`plan` lowered to the fastest of several backends; the report holds each one's time, or why it has none.

    Args:
      names: of the backends.
      lower_to: lowers `plan` to one of them.

    Raises: BackendError if not one of them takes the network, with their reasons.
    """
    found: dict[str, tuple[fx.GraphModule, LoweringReport]] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            found[name] = lower_to(name)
        except BackendError as error:
            refused[name] = str(error)
    if not found:
        raise BackendError("; ".join(refused.values()))
    steps = step_milliseconds({name: lowered for name, (lowered, _) in found.items()}, plan)
    lowered, report = found[min(steps, key=lambda name: steps[name])]
    timings = {key: timing for _, other in found.values() for key, timing in other.timings.items()}
    return lowered, replace(report, steps=steps, refused=refused, timings=timings)


def step_milliseconds(lowered: Mapping[str, fx.GraphModule], plan: fx.GraphModule) -> dict[str, float]:
    """Median milliseconds of a call of each lowered graph, taking turns, so that a busy moment hits all of them.

    Args:
      lowered: by backend; called as they are, not through torch.compile.
      plan: what they were lowered from; its inputs' sizes in calibration are those that are run.
    """
    inputs = example_inputs(plan)  # what the numbers are does not change the time
    times: dict[str, list[float]] = {name: [] for name in lowered}
    finish = time.perf_counter() + _SECONDS * len(lowered)
    with torch.no_grad():
        for turn in range(_WARM_UP + _MOST_RUNS):
            if turn >= _WARM_UP + _LEAST_RUNS and time.perf_counter() > finish:
                break
            for name, graph_module in lowered.items():
                started = time.perf_counter()
                graph_module(*inputs)
                if turn >= _WARM_UP:
                    times[name].append(1e3 * (time.perf_counter() - started))
    return {name: median(values) for name, values in times.items()}
