"""Medians of interleaved runs, on the processor's clock and on a GPU's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

Run = Callable[[], Any]

CALLS = 32
"""Calls in one CUDA graph: their kernels follow each other as in a network, and no launch is timed."""

_SECONDS = 0.05


def interleaved(
    runs: Sequence[Run],
    clock: Callable[[Run], float],
    *,
    warm_up: int = 3,
    least: int = 9,
    most: int = 101,
    budget: float = _SECONDS,
) -> list[float]:
    """Median seconds of each of the runs, taking turns, so that a busy moment hits all of them.

    Args:
      clock: seconds of one run.
      warm_up: turns that are not counted.
      least, most: turns that are; between them `budget` seconds decide.
    """
    times: list[list[float]] = [[] for _ in runs]
    started = time.perf_counter()
    for turn in range(warm_up + most):
        for run, kept in zip(runs, times, strict=True):
            seconds = clock(run)
            if turn >= warm_up:
                kept.append(seconds)
        if len(times[0]) >= least and time.perf_counter() - started > budget:
            break
    return [median(kept) for kept in times]


def processor_seconds(run: Run) -> float:
    """Of one run, on the processor's clock."""
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def gpu_seconds(run: Run) -> float:
    """Between the GPU's arrival at the first kernel of a run and its end; waits for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))


def gpu_kernel_seconds(runs: Sequence[Run]) -> list[float]:
    """Median seconds of the kernels that each of the runs launches, without the launches.

    A single call would be timed from its first line of Python on: its kernels are shorter than that. So every run is
    captured, `CALLS` times over, into a CUDA graph whose replays take turns.
    """
    graphs = [_captured(run) for run in runs]
    return [seconds / CALLS for seconds in interleaved([graph.replay for graph in graphs], gpu_seconds)]


def _captured(run: Run) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and lets libraries make their workspaces
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    return graph
