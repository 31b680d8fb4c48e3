"""Every way to spell attention becomes scaled_dot_product_attention; what only looks like it is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pass_checks import ROUNDING, PassRun, double, run_pass
from qdiff_fx.passes.prepare.spelled_attention import CanonicalizeAttention
from qdiff_fx.passes.prepare.training_ops import RemoveTrainingOps

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

SCALE = 0.3


class Attention(nn.Module):
    """q, k, v are given; a norm behind keeps shapes apart from the pattern."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attend(query, key, value) if mask is None else self.attend(query, key, value, mask)


def _canonicalize(attend: Callable[..., Tensor], *shapes: tuple[int, ...], mask: Tensor | None = None) -> PassRun:
    inputs = [double(*shape) for shape in shapes or TOKENS] + ([] if mask is None else [mask])
    # Casts leave assertions behind that would count as readers of the map.
    return run_pass(CanonicalizeAttention(), Attention(attend), inputs, before=(RemoveTrainingOps(),))


TOKENS = ((2, 5, 4), (2, 7, 4), (2, 7, 3))
"""[B, T, C] of q, k and v: cross-attention whose sizes all differ."""

HEADS = ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6))
"""[B, heads, T, C]."""

CHANNELS_FIRST = ((2, 4, 5), (2, 4, 7), (2, 3, 7))
"""[B, C, T], as guided-diffusion and the original DDPM code keep them."""


def _baddbmm(q: Tensor, k: Tensor, v: Tensor, *, beta: float = 0.0, alpha: float = SCALE) -> Tensor:
    empty = torch.zeros(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=beta, alpha=alpha)
    return torch.bmm(scores.softmax(dim=-1), v)


def _permuted_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.bmm(q.permute(0, 2, 1), k) * SCALE
    return torch.bmm(v, functional.softmax(weights, dim=2).permute(0, 2, 1))


def _both_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale).float(), dim=-1).type(q.dtype)
    return torch.einsum("bts,bcs->bct", weights, v)


SPELLINGS: dict[str, tuple[Attend, tuple[tuple[int, ...], ...]]] = {
    "matmul": (lambda q, k, v: torch.matmul((q @ k.transpose(-1, -2) * SCALE).softmax(-1), v), TOKENS),
    "matmul of heads": (lambda q, k, v: (q @ k.mT * SCALE).softmax(dim=3) @ v, HEADS),
    "divided": (lambda q, k, v: (q @ k.mT / math.sqrt(4)).softmax(-1) @ v, HEADS),
    "no scale": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, TOKENS),
    "two scales": (lambda q, k, v: (q @ k.mT * 2 / 5).softmax(-1) @ v, TOKENS),
    "scale on the left": (lambda q, k, v: (SCALE * (q @ k.mT)).softmax(-1) @ v, TOKENS),
    "scaled query": (lambda q, k, v: ((q * SCALE) @ k.mT).softmax(-1) @ v, TOKENS),
    "bmm": (lambda q, k, v: torch.bmm((torch.bmm(q, k.transpose(1, 2)) * SCALE).softmax(-1), v), TOKENS),
    "bmm with a permuted softmax": (_permuted_softmax, CHANNELS_FIRST),
    "baddbmm": (_baddbmm, TOKENS),
    "einsum of channels first": (_both_scaled, CHANNELS_FIRST),
    "einsum of heads": (
        lambda q, k, v: torch.einsum(
            "b h i j, b h j d -> b h i d", (torch.einsum("b h i d, b h j d -> b h i j", q, k) * SCALE).softmax(-1), v
        ),
        HEADS,
    ),
    "einsum of merged heads": (
        lambda q, k, v: torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k).softmax(-1), v),
        TOKENS,
    ),
    "mT everywhere": (lambda q, k, v: (v.mT @ (q @ k.mT).softmax(-1).mT).mT, TOKENS),
    "dropout behind softmax": (
        lambda q, k, v: functional.dropout((q @ k.mT * SCALE).softmax(-1), 0.1, training=False) @ v,
        TOKENS,
    ),
    "softmax in another type": (
        lambda q, k, v: (q @ k.mT * SCALE).double().softmax(-1, dtype=torch.float64).to(q.dtype) @ v,
        TOKENS,
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_found(name: str) -> None:
    attend, shapes = SPELLINGS[name]
    run = _canonicalize(attend, *shapes)
    assert run.result.modified and len(run.result.rewrites) == 1
    assert run.count("scaled_dot_product_attention") == 1 and run.count("softmax") == 0
    assert not {"matmul", "bmm", "baddbmm", "einsum"} & set(run.operators)
    # guided-diffusion takes the softmax in float32 whatever the carrier.
    assert run.error() < (1e-6 if name == "einsum of channels first" else ROUNDING)


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (2, 5, 7), (2, 1, 1, 7)], ids=str)
def test_an_added_mask_is_kept_with_its_shape(shape: tuple[int, ...]) -> None:
    shapes = TOKENS if len(shape) < 4 else HEADS
    run = _canonicalize(lambda q, k, v, mask: (q @ k.mT * SCALE + mask).softmax(-1) @ v, *shapes, mask=double(*shape))
    assert run.result.modified and run.error() < ROUNDING


def test_a_mask_on_the_left_and_one_of_minus_infinity_are_kept() -> None:
    mask = torch.zeros(5, 7, dtype=torch.float64).masked_fill(torch.rand(5, 7) > 0.7, -torch.inf)
    mask[:, 0] = 0.0
    run = _canonicalize(lambda q, k, v: (mask + q @ k.mT * SCALE).softmax(-1) @ v)
    assert run.result.modified and run.error() < ROUNDING


def _where(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, q @ k.mT * SCALE, -torch.inf).softmax(-1) @ v


FILLS: dict[str, Callable[..., Tensor]] = {
    "masked_fill": lambda q, k, v, mask: (q @ k.mT * SCALE).masked_fill(~mask, -torch.inf).softmax(-1) @ v,
    "masked_fill in place": lambda q, k, v, mask: (
        torch.einsum("bid,bjd->bij", q, k).masked_fill_(~mask, -torch.finfo(q.dtype).max).softmax(-1) @ v
    ),
    "a large number": lambda q, k, v, mask: (q @ k.mT).masked_fill(mask.logical_not(), -1e18).softmax(-1) @ v,
    "where": _where,
    "where the other way": lambda q, k, v, mask: torch.where(~mask, -torch.inf, q @ k.mT).softmax(-1) @ v,
}


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (2, 1, 7)], ids=str)
@pytest.mark.parametrize("name", FILLS)
def test_filled_scores_become_an_added_mask(name: str, shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True
    run = _canonicalize(FILLS[name], mask=mask)
    assert run.result.modified and run.count("scaled_dot_product_attention") == 1
    assert run.count("masked_fill_") == 0 and run.count("softmax") == 0
    assert run.error() < ROUNDING


def test_a_row_that_is_wholly_filled_by_a_finite_number_stays_the_mean_of_the_values() -> None:
    run = _canonicalize(FILLS["masked_fill in place"], mask=torch.zeros(5, 7, dtype=torch.bool))
    assert run.result.modified and run.error() < ROUNDING


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_what_baddbmm_adds_is_a_mask_with_its_own_factor(beta: float) -> None:
    run = _canonicalize(
        lambda q, k, v, mask: torch.baddbmm(mask, q, k.mT, beta=beta, alpha=SCALE).softmax(dim=-1) @ v,
        mask=double(2, 5, 7),
    )
    assert run.result.modified and run.error() < ROUNDING


@pytest.mark.parametrize("options", [{}, {"scale": 0.2}, {"is_causal": True}], ids=str)
def test_the_canonical_form_is_left_as_it_is(options: dict[str, float]) -> None:
    run = _canonicalize(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, **options))
    assert not run.result.modified and not run.reasons and run.count("scaled_dot_product_attention") == 1


REFUSED: dict[str, tuple[Attend, tuple[tuple[int, ...], ...], str]] = {
    "softmax over the queries": (
        lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
        TOKENS,
        "softmax is not over the keys' dimension",
    ),
    "softmax over the heads": (
        lambda q, k, v: (q @ k.mT).softmax(1) @ v,
        HEADS,
        "softmax is not over the keys' dimension",
    ),
    "probabilities transposed before v": (
        lambda q, k, v: (q @ k.mT).softmax(-1).transpose(-1, -2) @ v,
        ((2, 5, 4), (2, 5, 4), (2, 5, 3)),
        "the probabilities are rearranged before they meet v",
    ),
    "a map that is used elsewhere": (
        lambda q, k, v: (lambda p: p @ v + p.sum(-1, keepdim=True))((q @ k.mT).softmax(-1)),
        TOKENS,
        "is read elsewhere too: attention maps are used",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_near_misses_are_refused_with_their_reason(name: str) -> None:
    attend, shapes, reason = REFUSED[name]
    run = _canonicalize(attend, *shapes)
    assert not run.result.modified and run.error() == 0.0
    assert len(run.reasons) == 1 and reason in run.reasons[0]


UNMATCHED: dict[str, tuple[Attend, tuple[tuple[int, ...], ...]]] = {
    "a scale behind the mask": (lambda q, k, v: ((q @ k.mT + torch.ones(5, 7)) * SCALE).softmax(-1) @ v, TOKENS),
    "two masks": (lambda q, k, v: (q @ k.mT + torch.ones(5, 7) + torch.ones(7)).softmax(-1) @ v, TOKENS),
    "a nonlinearity": (lambda q, k, v: (q @ k.mT).tanh().softmax(-1) @ v, TOKENS),
    "no softmax": (lambda q, k, v: (q @ k.mT).sigmoid() @ v, TOKENS),
    "a scale by a tensor": (lambda q, k, v: (q @ k.mT * v.mean()).softmax(-1) @ v, TOKENS),
    "broadcast keys": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, ((2, 3, 5, 4), (1, 3, 7, 4), (2, 3, 7, 4))),
    "broadcast values": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, ((2, 3, 5, 4), (2, 3, 7, 4), (1, 3, 7, 4))),
    "two contracted dimensions": (
        lambda q, k, v: torch.einsum("bij,bjd->bid", torch.einsum("bhid,bhjd->bij", q, k).softmax(-1), v),
        (HEADS[0], HEADS[1], (2, 7, 3)),
    ),
    "values without batch": (
        lambda q, k, v: torch.einsum("bij,jd->bid", (q @ k.mT).softmax(-1), v[0]),
        TOKENS,
    ),
    "two-dimensional": (lambda q, k, v: (q[0] @ k[0].T).softmax(-1) @ v[0], TOKENS),
    "a fill that is no mask": (lambda q, k, v: (q @ k.mT).masked_fill(q[..., :1] > 0, -9.0).softmax(-1) @ v, TOKENS),
    "a fill before the scale": (
        lambda q, k, v: ((q @ k.mT).masked_fill(q[..., :1] > 0, -torch.inf) * SCALE).softmax(-1) @ v,
        TOKENS,
    ),
    "a fill and a mask": (
        lambda q, k, v: (q @ k.mT + torch.ones(7)).masked_fill(q[..., :1] > 0, -1e30).softmax(-1) @ v,
        TOKENS,
    ),
}


@pytest.mark.parametrize("name", UNMATCHED)
def test_other_shapes_of_computation_are_no_attention_and_say_why(name: str) -> None:
    attend, shapes = UNMATCHED[name]
    run = _canonicalize(attend, *shapes)
    assert not run.result.modified and run.count("scaled_dot_product_attention") == 0
    assert len(run.reasons) == (name != "no softmax"), run.reasons


def test_two_attentions_in_a_row_both_become_canonical() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = (q @ k.mT * SCALE).softmax(-1) @ k
        return (first @ k.mT * SCALE).softmax(-1) @ v

    run = _canonicalize(twice)
    assert len(run.result.rewrites) == 2 and run.count("scaled_dot_product_attention") == 2
    assert run.error() < ROUNDING
