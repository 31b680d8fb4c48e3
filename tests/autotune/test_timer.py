"""Runs take turns; on a GPU, kernels are timed in captured graphs, without their launches."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qdiff_fx.autotune import timer
from qdiff_fx.autotune.timer import CALLS, gpu_kernel_seconds, interleaved


def test_runs_take_turns_and_the_first_turns_do_not_count() -> None:
    order: list[str] = []
    runs = [lambda: order.append("a"), lambda: order.append("b")]
    seconds = iter([100.0, 200.0, 1.0, 4.0, 3.0, 6.0, 2.0, 5.0])

    def clock(run: Any) -> float:
        run()
        return next(seconds)

    assert interleaved(runs, clock, warm_up=1, least=3, most=3) == [2.0, 5.0]
    assert order == ["a", "b"] * 4


def test_a_budget_ends_the_turns_once_there_are_enough() -> None:
    calls: list[int] = []
    interleaved([lambda: None], lambda run: calls.append(1) or 1.0, warm_up=2, least=4, most=1000, budget=0.0)
    assert len(calls) == 6


class FakeCuda:
    """What the timer asks of torch.cuda, with a clock that moves by a microsecond a call and five a launch."""

    def __init__(self) -> None:
        self.now, self.capturing = 0.0, None
        self.launches = 0
        outer = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = outer.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Any) -> float:
                return 1e-3 * float(other.at - self.at)

        class Graph:
            def __init__(self) -> None:
                self.calls: list[float] = []

            def replay(self) -> None:
                outer.now += sum(self.calls)

        self.Event, self.CUDAGraph = Event, Graph
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.current_stream = self.Stream

    @contextmanager
    def stream(self, side: Any) -> Any:
        yield

    @contextmanager
    def graph(self, graph: Any) -> Any:
        self.capturing = graph
        yield
        self.capturing = None

    def kernel(self, microseconds: float) -> None:
        """A call of one kernel: captured, or launched."""
        if self.capturing is not None:
            self.capturing.calls.append(microseconds)
        else:
            self.launches += 1
            self.now += 5.0 + microseconds


def test_a_gpus_kernels_are_timed_without_their_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(timer, "torch", SimpleNamespace(cuda=fake))
    first, second = gpu_kernel_seconds([lambda: fake.kernel(3.0), lambda: fake.kernel(8.0)])
    assert first == pytest.approx(3e-6) and second == pytest.approx(8e-6)
    assert fake.launches == 4, "two runs each before the capture, none while timing"
    assert CALLS > 1


@pytest.mark.parametrize("name", ["Event", "CUDAGraph", "Stream", "current_stream", "stream", "graph"])
def test_the_fake_has_the_names_of_torch(name: str) -> None:
    assert hasattr(torch.cuda, name) and hasattr(FakeCuda(), name)
