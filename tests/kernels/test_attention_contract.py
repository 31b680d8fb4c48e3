"""Backends that compute quantized attention themselves round operands and probabilities where the plan does."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn

from contract_backends import Tried, lowered

qdiff = torch.ops.qdiff

STEPS, ZERO_POINTS = (0.03, 0.05, 1.0), (100, 140, 0)
SCORE_ERROR = 2.0**-18
"""Of a probability, relative: scores below 16, each a sum of a few products in float32, then exp and a division."""


@dataclass(frozen=True, kw_only=True)
class Case:
    leading: tuple[int, ...] = (2, 3)
    queries: int = 9
    keys: int = 11
    head: int = 8
    mask: str = "none"
    bits: int = 8
    scale: float | None = None


CASES = {
    "self": Case(queries=11),
    "cross": Case(),
    "three-dimensional": Case(leading=(3,)),
    "odd-head": Case(head=5, queries=3, keys=33),
    "one-key": Case(keys=1),
    "scaled": Case(scale=0.11),
    "float-mask": Case(mask="float"),
    "bool-mask": Case(mask="bool"),
    "4-bit-probabilities": Case(bits=4),
}


def operands(case: Case) -> list[Tensor]:
    """q, k and v on their grids; v is the identity, so that outputs are the probabilities."""
    generator = torch.Generator().manual_seed(4)
    real = []
    for length, step, zero_point in zip((case.queries, case.keys), STEPS, ZERO_POINTS, strict=False):
        codes = torch.randint(zero_point - 20, zero_point + 40, (*case.leading, length, case.head), generator=generator)
        real.append((codes - zero_point) * step)
    return [*real, torch.eye(case.keys).expand(*case.leading, -1, -1).contiguous()]


def mask_of(case: Case) -> Tensor | None:
    generator = torch.Generator().manual_seed(5)
    if case.mask == "none":
        return None
    values = torch.randn(case.queries, case.keys, generator=generator)
    return values if case.mask == "float" else values > -0.5


@pytest.mark.parametrize("backend", ["reference", "cuda", "openvino"], indirect=True)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_probabilities_lie_on_the_step_nearest_to_the_exact_ones(backend: Tried, case: Case) -> None:
    inputs, mask = operands(case), mask_of(case)
    last = 2**case.bits - 1

    def build(graph: fx.Graph, root: nn.Module, given: list[fx.Node]) -> fx.Node:
        if mask is not None:
            root.register_buffer("mask", mask)
        numbers = (False, case.scale, list(STEPS), list(ZERO_POINTS), 8, case.bits)
        return graph.call_function(
            qdiff.attention.default, (*given, None if mask is None else graph.get_attr("mask"), *numbers)
        )

    result = lowered(backend, inputs, build, strict=True)(*inputs)
    query, key, _ = (item.double() for item in inputs)
    scores = query @ key.mT * (case.head**-0.5 if case.scale is None else case.scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    exact = scores.softmax(-1) * last
    codes = (result * last).double()
    assert ((codes - codes.round()).abs() < 1e-4).all()
    assert ((codes.round() - exact).abs() <= 0.5 + SCORE_ERROR * exact).all()
