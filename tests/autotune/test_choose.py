"""The choice by times: equal subjects are timed once, a tie goes where the margin says."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from qdiff_fx.autotune import Choices, Subject, choose
from qdiff_fx.graph.meta import TIMED, LayerTiming


def nodes(*names: str) -> list[fx.Node]:
    graph = fx.Graph()
    return [graph.placeholder(name) for name in names]


def subject(node: fx.Node, timing: LayerTiming, *, key: str = "k", margin: float | None = 0.95) -> Subject:
    kernels = ("a", "b") if timing.kernel else ()
    return Subject(nodes=(node,), key=key, dtype=torch.bfloat16, measure=lambda: timing, kernels=kernels, margin=margin)


def test_nothing_to_choose_is_no_choice() -> None:
    assert choose([], {}) == Choices(carrier={}, kernels={}, timings={})


def test_equal_subjects_are_timed_once() -> None:
    calls: list[str] = []

    def measure() -> LayerTiming:
        calls.append("timed")
        return LayerTiming(integer=1.0, carrier=2.0, kernel="b")

    twins = [
        Subject(nodes=(node,), key="same", dtype=torch.float16, measure=measure, kernels=("a", "b"))
        for node in nodes("x", "y")
    ]
    choices = choose(twins, {})
    assert calls == ["timed"] and choices.kernels == {"x": "b", "y": "b"} and not choices.carrier
    assert all(TIMED.require(unit.nodes[0]) == choices.timings["same"] for unit in twins)
    assert choose(twins, choices.timings) == choices and calls == ["timed"]


@pytest.mark.parametrize(
    ("carrier", "margin", "leaves"),
    [(95.0, 0.95, True), (96.0, 0.95, False), (100.0, 1.0, True), (101.0, 1.0, False), (1.0, None, False)],
)
def test_the_carrier_must_win_by_the_margin(carrier: float, margin: float | None, leaves: bool) -> None:
    (node,) = nodes("x")
    choices = choose([subject(node, LayerTiming(integer=100.0, carrier=carrier, kernel="a"), margin=margin)], {})
    assert (node.name in choices.carrier) == leaves
    assert choices.kernels == ({} if leaves else {"x": "a"})
    if leaves:
        assert choices.carrier["x"] == f"timed 100 us on integers, {carrier:.0f} us in bfloat16"


def test_the_time_of_a_kernel_that_is_gone_is_taken_again() -> None:
    (node,) = nodes("x")
    fresh = LayerTiming(integer=1.0, carrier=2.0, kernel="a")
    stale = {"k": LayerTiming(integer=1.0, carrier=2.0, kernel="gone")}
    assert choose([subject(node, fresh)], stale).timings == {"k": fresh}
