"""What does nothing at inference goes; what only looks so stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pass_checks import PassRun, run_pass
from qdiff_fx.passes.prepare.training_ops import RemoveTrainingOps


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, sample: Tensor) -> Tensor:
        return self.function(sample * 2) + 3


def _remove(function: Callable[[Tensor], Tensor], sample: Tensor | None = None) -> PassRun:
    run = run_pass(RemoveTrainingOps(), Apply(function), (torch.randn(2, 3, 4, 4) if sample is None else sample,))
    assert run.error() == 0.0
    return run


NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout in eval": lambda x: functional.dropout(x, 0.5, training=False),
    "dropout of probability 0": lambda x: functional.dropout(x, 0.0, training=True),
    "a whole slice": lambda x: x[:, :],
    "times 1": lambda x: x * 1.0,
    "divided by 1": lambda x: x / 1,
    "detach": lambda x: x.detach(),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_does_nothing_is_removed(name: str) -> None:
    run = _remove(NOTHING[name])
    assert run.result.modified and run.operators == ["mul", "add"]


def test_a_chain_of_them_is_removed() -> None:
    assert _remove(lambda x: functional.dropout(x / 1.0, 0.1, False)[:, :] * 1).operators == ["mul", "add"]


SOMETHING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a part of the channels": (lambda x: x.narrow(1, 1, 2), "narrow"),
    "every other row": (lambda x: torch.ops.aten.slice.Tensor(x, 2, None, None, 2), "slice"),
    "all but the first": (lambda x: torch.ops.aten.slice.Tensor(x, 1, 1), "slice"),
    "times 2": (lambda x: x * 2.0, "mul"),
    "times a tensor of ones": (lambda x: x * torch.ones_like(x), "mul"),
    "contiguous": (lambda x: x.transpose(2, 3).contiguous(), "contiguous"),
}


@pytest.mark.parametrize("name", SOMETHING)
def test_what_only_looks_like_it_stays(name: str) -> None:
    function, operator = SOMETHING[name]
    run = _remove(function)
    assert not run.result.modified and operator in run.operators


def test_an_integer_divided_by_one_becomes_floating_and_stays() -> None:
    assert not _remove(lambda x: x / 1, torch.ones(2, 3, dtype=torch.int64)).result.modified


def test_a_cast_stays_and_the_assertion_about_it_goes() -> None:
    run = _remove(lambda x: x.to(torch.float64))
    assert run.result.rewrites == ("_assert_tensor_metadata_default",) and run.operators == ["mul", "to", "add"]
