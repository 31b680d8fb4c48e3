"""Attention on bytes: probabilities within a step of exact ones, exact averages, every layout; faults refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qdiff_fx.kernels import reference
from qdiff_fx.kernels.x86_native import VNNI, load_kernels
from subjects import codes

qdiff = torch.ops.qdiff

pytestmark = pytest.mark.skipif(not load_kernels(VNNI), reason="the CPU has no AVX512-VNNI")


def run(q: Tensor, k: Tensor, v: Tensor, score_scale: float, zero_points: tuple[int, int] = (128, 128)) -> Tensor:
    result: Tensor = qdiff.vnni_attention(q, k, v, score_scale, 1.0, list(zero_points), 255, torch.float32)
    return result


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 2),
    heads=st.integers(1, 3),
    queries=st.integers(0, 60),
    keys=st.integers(1, 70),
    size=st.integers(1, 70),
    zero_points=st.tuples(st.integers(0, 255), st.integers(0, 255)),
    qmax=st.sampled_from([255, 15, 65535]),
    extreme=st.booleans(),
    seed=st.integers(0, 99),
)
def test_probabilities_are_within_a_step(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    size: int,
    zero_points: tuple[int, int],
    qmax: int,
    extreme: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    q, k = codes(batch, heads, queries, size), codes(batch, heads, keys, size)
    if extreme:
        q, k = (item // 128 * 255 for item in (q, k))
    scores = (q.double() - zero_points[0]) @ (k.double() - zero_points[1]).mT
    scale = 6.0 / max(1.0, float(scores.std())) if scores.numel() > 1 else 1.0
    powers = qmax * torch.exp(scale * (scores - scores.amax(-1, keepdim=True)))
    # v is the identity: the output is the probabilities, and what rounding took from the row, shared by all.
    identity = (torch.eye(keys, dtype=torch.uint8) + 128).expand(batch, heads, -1, -1)
    result = qdiff.vnni_attention(q, k, identity, scale, 1.0, [zero_points[0], 128], qmax, torch.float32)
    assert result.shape == (batch, heads, queries, keys)
    if result.numel():
        lost = (powers - powers.round()).mean(-1, keepdim=True)
        seen = result.double() * powers.sum(-1, keepdim=True) - lost
        # A step where a power lies half way between two, and what 2^x is off by: 2.6e-6 of itself, and float32's
        # rounding of an exponent of up to 2^6. A step more or less of one is shared by all, too.
        assert (seen - powers).abs().max() < 0.6 + 2e-5 * qmax
        assert torch.allclose(result.sum(-1), torch.ones_like(result[..., 0]), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 30),
    keys=st.integers(1, 300),
    size=st.integers(1, 200),
    zero_point=st.integers(0, 255),
    seed=st.integers(0, 99),
)
def test_averages_are_exact(queries: int, keys: int, size: int, zero_point: int, seed: int) -> None:
    """Every score is the same, every probability qmax: what is left is the mean of the values."""
    torch.manual_seed(seed)
    v = codes(2, keys, size)
    q = torch.full((2, queries, 8), 77, dtype=torch.uint8)
    result = run(q, codes(2, keys, 8), v, 0.1, (77, zero_point))
    wanted = (v.double() - zero_point).mean(-2, keepdim=True).expand_as(result)
    assert torch.allclose(result.double(), wanted, rtol=0, atol=1e-4)


def rows_of(kind: str, keys: int) -> Tensor:
    """Scores of 64 rows: normal, flat, or one large score over a flat tail."""
    scores = torch.randn(64, keys)
    if kind == "flat":
        return 0.1 * scores
    if kind == "sink":
        scores = 0.1 * scores
        scores[torch.arange(64), torch.randint(keys, (64,))] = 6.3
    return scores


@pytest.mark.parametrize(("qmax", "bound"), [(255, 1.0), (65535, 0.02)])
@pytest.mark.parametrize("keys", [77, 1024, 4096])
@pytest.mark.parametrize("kind", ["normal", "flat", "sink"])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_it_errs_less_than_the_plan(kind: str, keys: int, mean: float, qmax: int, bound: float) -> None:
    """A grid of 1/255 rounds most probabilities of a row over 4096 keys to zero; a grid of the row's own does not.

    Nor is the sum of many small ones lost behind one large one. Keys are one-hot: scores are the queries' elements.
    """
    torch.manual_seed(0)
    step = 0.05
    scores = (rows_of(kind, keys) / step).round().clamp(-128, 127)
    q = (scores + 128).to(torch.uint8)[None]
    k = (torch.eye(keys) + 128).to(torch.uint8)[None]
    v = ((torch.randn(1, keys, 40) + mean) * 32 + 128).round().clamp(0, 255).to(torch.uint8)
    real = [(q.double() - 128) * step, k.double() - 128, (v.double() - 128) / 32]
    exact = torch.nn.functional.scaled_dot_product_attention(*real, scale=1.0)
    result = qdiff.vnni_attention(q, k, v, step, 1 / 32, [128, 128], qmax, torch.float32)
    planned = reference.attention(*(item.float() for item in real), None, False, 1.0, [], [], 0, 8)
    error, planned_error = (float((item - exact).norm() / exact.norm()) for item in (result, planned))
    assert error < bound * planned_error + 1e-5


def test_layouts_and_threads_change_nothing() -> None:
    torch.manual_seed(0)
    wide = codes(2, 300, 3, 120)  # [batch, length, heads, q | k | v]; keys enough to be packed by two threads
    q, k, v = wide.transpose(1, 2).split(40, dim=-1)
    wanted = run(*(item.contiguous() for item in (q, k, v)), 1e-4)
    swapped = v.mT.contiguous().mT  # the values' elements are not neighbours
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results = [run(q, k, v, 1e-4), run(q, k, swapped, 1e-4)]
            flat = run(*(item.flatten(0, 1) for item in (q, k, v)), 1e-4)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(result, wanted) for result in results)
        assert torch.equal(flat.view_as(wanted), wanted) and flat.is_contiguous()
    assert wanted.transpose(1, 2).is_contiguous()  # the layer behind reads rows of all heads
    narrow = qdiff.vnni_attention(q, k, v, 1e-4, 1.0, [128, 128], 255, torch.bfloat16)
    assert torch.equal(narrow, wanted.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("shapes", "fault"),
    [
        (((2, 4), (3, 4), (3, 4)), "heads, length, size"),
        (((1, 2, 4), (1, 3, 5), (1, 3, 4)), "q .* k .* v"),
        (((1, 2, 4), (1, 3, 4), (1, 2, 4)), "q .* k .* v"),
        (((2, 2, 4), (1, 3, 4), (1, 3, 4)), "same batch and heads"),
        (((1, 2, 4), (1, 0, 4), (1, 0, 4)), "1 to 65536 keys"),
        (((1, 1, 1), (1, 65537, 1), (1, 65537, 1)), "1 to 65536 keys"),
        (((1, 1, 32769), (1, 1, 32769), (1, 1, 1)), "head size of at most 32768"),
    ],
)
def test_operands_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...], fault: str) -> None:
    with pytest.raises(RuntimeError, match=fault):
        run(*(codes(*shape) for shape in shapes), 1.0)


def test_numbers_that_cannot_be_are_refused() -> None:
    q = codes(1, 2, 4)
    with pytest.raises(RuntimeError, match="uint8"):
        run(q, q.to(torch.int8), q, 1.0)
    with pytest.raises(RuntimeError, match="qmax"):
        qdiff.vnni_attention(q, q, q, 1.0, 1.0, [0, 0], 65536, torch.float32)
    for scale in (-1.0, 1e21, float("inf"), float("nan")):
        with pytest.raises(RuntimeError, match="score scale"):
            run(q, q, q, scale)
    for zero_points in ([0, 0, 0], [0, 256], [-1, 0]):
        with pytest.raises(RuntimeError, match="zero points"):
            qdiff.vnni_attention(q, q, q, 1.0, 1.0, zero_points, 255, torch.float32)
    with pytest.raises(RuntimeError, match="bfloat16 or float32"):
        qdiff.vnni_attention(q, q, q, 1.0, 1.0, [0, 0], 255, torch.float16)


@pytest.mark.parametrize("leading", [(2,), (2, 3)])
def test_operator_agrees_with_its_fake(leading: tuple[int, ...]) -> None:
    q, k, v = (codes(*leading, length, size) for length, size in ((5, 8), (7, 8), (7, 12)))
    operands = (q, k, v, 0.01, 0.1, [3, 4], 255, torch.bfloat16)
    torch.library.opcheck(qdiff.vnni_attention.default, operands, test_utils=("test_schema", "test_faketensor"))
