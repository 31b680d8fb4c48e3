"""Integer attention in Triton's interpreter: equal score accumulators, probabilities within a step."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from cuda_cases import AttentionCase, prepare_attention
from qdiff_fx.numerics.attention import attend, attention_probabilities
from qdiff_fx.numerics.spec import QuantSpec

attention = torch.ops.qdiff.cuda_attention.default


@settings(max_examples=10)
@given(
    queries=st.integers(1, 40), keys=st.integers(1, 40), head=st.sampled_from([1, 5, 32, 40]), seed=st.integers(0, 9)
)
def test_score_accumulators_are_equal(queries: int, keys: int, head: int, seed: int) -> None:
    from qdiff_fx.kernels.triton_kernels.launch import attention_scores

    prepared = prepare_attention(AttentionCase(heads=1, queries=queries, keys=keys, head=head, seed=seed))
    query, key = (item[0, 0] for item in prepared.arguments[:2])
    wanted = [item[0, 0].double() - z for item, z in zip(prepared.codes[:2], prepared.zero_points[:2], strict=True)]
    seen = attention_scores(query, key, [item - 128 for item in prepared.zero_points])
    assert torch.equal(seen.double(), wanted[0] @ wanted[1].T)


@st.composite
def cases(draw: st.DrawFn) -> AttentionCase:
    keys = draw(st.integers(1, 40))
    return AttentionCase(
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        queries=draw(st.integers(1, 40)),
        keys=keys,
        head=draw(st.sampled_from([3, 16, 40])),
        value_head=keys,
        mask=draw(st.sampled_from([None, "bool", "float", "row"])),
        causal=draw(st.booleans()),
        bits=draw(st.sampled_from([8, 4])),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=15)
@given(case=cases())
def test_probabilities_are_within_one_step(case: AttentionCase) -> None:
    # v is the identity: the output is the probabilities.
    identity = torch.eye(case.keys, dtype=torch.uint8).expand(case.batch, case.heads, -1, -1) + 128
    prepared = prepare_attention(case, identity)
    query, key, _ = prepared.real()
    wanted = attention_probabilities(query @ key.mT, prepared.mask, case.causal, case.head**-0.5)
    qmax = 2**case.bits - 1
    codes = attention(*prepared.arguments) / prepared.scales[2] * qmax
    assert (codes - codes.round()).abs().max() < 1e-3
    assert (codes.round() - (wanted * qmax).round()).abs().max() <= 1


@pytest.mark.parametrize("carrier", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, "row"])
def test_outputs_are_those_of_the_reference_but_for_a_few_steps(carrier: torch.dtype, mask: str | None) -> None:
    case = AttentionCase(queries=40, keys=70, head=40, value_head=24, mask=mask, carrier=carrier)
    prepared = prepare_attention(case)
    query, key, value = (item.float() for item in prepared.real())
    wanted = attend(query, key, value, prepared.mask, False, None, QuantSpec(bits=8, symmetric=True))
    result = attention(*prepared.arguments)
    assert result.dtype == carrier
    # One probability in a thousand may lie a step off: 1/255 of a value of at most 128 * 0.05.
    bound = 3 * 128 * 0.05 / 255 + torch.finfo(carrier).eps * wanted.abs()
    assert ((result.float() - wanted).abs() <= bound).all()


def test_three_dimensional_operands_and_empty_ones() -> None:
    prepared = prepare_attention(AttentionCase(heads=1))
    flat = [item[:, 0] for item in prepared.arguments[:3]]
    assert torch.equal(attention(*flat, *prepared.arguments[3:]), attention(*prepared.arguments)[:, 0])
    assert attention(flat[0][:0], flat[1][:0], flat[2][:0], *prepared.arguments[3:]).shape == (0, 9, 8)


def test_a_query_without_keys_gives_zero() -> None:
    prepared = prepare_attention(AttentionCase())
    mask = torch.ones(9, 11, dtype=torch.bool)
    mask[4] = False
    arguments = list(prepared.arguments)
    arguments[3] = mask
    result = attention(*arguments)
    assert (result[:, :, 4] == 0).all() and result[:, :, 3].abs().max() > 0


def test_operator_keeps_the_contract_of_torch() -> None:
    for case in (AttentionCase(causal=True), AttentionCase(mask="row", carrier=torch.bfloat16, value_head=6)):
        torch.library.opcheck(
            attention,
            prepare_attention(case).arguments,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
