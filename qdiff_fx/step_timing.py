"""How long each backend takes for one step of the network, on the sizes of the example call."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median

import torch
from torch import fx

from qdiff_fx.graph.propagate import example_inputs

_WARM_UP, _LEAST_RUNS, _MOST_RUNS, _SECONDS = 2, 3, 21, 1.0


def step_milliseconds(lowered: Mapping[str, fx.GraphModule], plan: fx.GraphModule) -> dict[str, float]:
    """Median milliseconds of a call of each lowered graph, taking turns, so that a busy moment hits all of them.

    Args:
      lowered: by backend; called as they are, not through torch.compile.
      plan: what they were lowered from; its inputs' sizes in the example call are those that are run.
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
