"""The cuda kernels in Triton's interpreter give the reference's bits, and the operators keep torch's contract."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from cuda_cases import STORED, LayerCase, prepare_layer

CARRIERS = (torch.float16, torch.bfloat16, torch.float32)
PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def layers(draw: st.DrawFn, *, linear: bool = False) -> LayerCase:
    """Shapes that no tile divides, borders wider than the image, and every exact epilogue."""
    groups = 1 if linear else draw(st.sampled_from([1, 1, 2, 3]))
    kernel = (1, 1) if linear else draw(PAIRS)
    dilation, padding = (1, 1), (0, 0)
    if not linear:
        dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
        padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    reach = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    return LayerCase(
        batch=draw(st.integers(1, 3)),
        channels=groups * draw(st.integers(1, 36 // groups)),
        outputs=groups * draw(st.integers(1, 36 // groups)),
        height=draw(st.integers(max(1, reach[0]), 7)),
        width=draw(st.integers(max(1, reach[1]), 7)),
        kernel=None if linear else kernel,
        stride=draw(PAIRS),
        padding=padding,
        dilation=dilation,
        groups=groups,
        stored=draw(st.sampled_from(STORED)),
        x_zero_point=draw(st.integers(0, 255)),
        bias=draw(st.booleans()),
        embedding=not linear and draw(st.booleans()),
        residual=draw(st.booleans()),
        requantize=draw(st.booleans()),
        carrier=draw(st.sampled_from(CARRIERS)),
        tile=draw(st.sampled_from([(32, 32, 32), (64, 32, 32), (16, 64, 64)])),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def described_layers(draw: st.DrawFn) -> LayerCase:
    """Layers that the copy engine can fetch for: no stride, no groups, channels in whole 16 bytes."""
    stored = draw(st.sampled_from(STORED))
    kernel = draw(st.none() | PAIRS)
    case = draw(layers(linear=kernel is None))
    rows, outputs, depth = draw(st.sampled_from([(16, 32, 32), (32, 32, 32), (64, 16, 32), (32, 32, 64)]))
    step = 16 if stored == "int8" else 2 * depth  # packed weights end where a step does
    return replace(
        case,
        channels=step * draw(st.integers(1, 3)),
        outputs=draw(st.integers(1, 40)),
        kernel=None if kernel is None else case.kernel,
        stride=(1, 1),
        groups=1,
        stored=stored,
        embedding=kernel is not None and case.embedding,
        tile=(rows, outputs, depth),
        descriptors=True,
        split=draw(st.integers(1, 4)),
    )


@settings(max_examples=40)
@given(case=described_layers())
def test_layers_by_descriptors_give_the_references_bits(case: LayerCase) -> None:
    prepared = prepare_layer(case)
    result = prepared.run()
    assert result.dtype == prepared.wanted.dtype and torch.equal(result, prepared.wanted)


def test_a_slice_of_merged_layers_is_an_embedding_as_it_is() -> None:
    for descriptors in (False, True):
        prepared = prepare_layer(LayerCase(channels=16, outputs=8, embedding=True, descriptors=descriptors))
        names = [item.name for item in prepared.operator._schema.arguments]
        embedding = dict(zip(names, prepared.arguments, strict=True))["embedding"]
        whole = torch.cat([torch.ones(2, 3), embedding, torch.ones(2, 5)], dim=1)
        assert torch.equal(prepared.run(embedding=whole[:, 3:11]), prepared.wanted)


def test_an_image_of_one_pixel_has_the_strides_of_its_shape() -> None:
    prepared = prepare_layer(LayerCase(channels=32, height=1, width=1, descriptors=True))
    assert prepared.arguments[0].stride() != (32, 1, 32, 32)
    assert torch.equal(prepared.run(), prepared.wanted)


def test_an_input_at_an_odd_address_is_moved() -> None:
    prepared = prepare_layer(LayerCase(kernel=None, channels=16, descriptors=True))
    x = prepared.arguments[0]
    odd = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    assert odd.data_ptr() % 16 and torch.equal(prepared.run(x=odd), prepared.wanted)


@settings(max_examples=40)
@given(case=layers())
def test_convolutions_give_the_references_bits(case: LayerCase) -> None:
    prepared = prepare_layer(case)
    result = prepared.run()
    assert result.dtype == prepared.wanted.dtype and torch.equal(result, prepared.wanted)
    assert result.permute(0, 2, 3, 1).is_contiguous()


@settings(max_examples=20)
@given(case=layers(linear=True))
def test_linears_give_the_references_bits(case: LayerCase) -> None:
    prepared = prepare_layer(case)
    assert torch.equal(prepared.run(), prepared.wanted)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("requantize", [False, True])
def test_int_mm_takes_any_number_of_rows(rows: int, requantize: bool) -> None:
    case = LayerCase(kernel=None, batch=1, height=rows, channels=16, outputs=24, residual=True, requantize=requantize)
    prepared = prepare_layer(case)
    assert torch.equal(prepared.run(kernel="int_mm"), prepared.wanted)


@pytest.mark.parametrize("kernel", ["triton", "int_mm"])
@pytest.mark.parametrize("shape", [(0, 3, 16), (2, 0, 16)])
def test_nothing_in_nothing_out(kernel: str, shape: tuple[int, ...]) -> None:
    prepared = prepare_layer(LayerCase(kernel=None, channels=16, outputs=8))
    assert prepared.run(x=torch.zeros(shape, dtype=torch.int8), kernel=kernel).shape == (*shape[:2], 8)


@pytest.mark.parametrize("kernel", [(3, 3), None])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_silu_is_within_rounding(kernel: tuple[int, int] | None, carrier: torch.dtype) -> None:
    case = LayerCase(kernel=kernel, silu=True, carrier=carrier, channels=33, outputs=20)
    prepared = prepare_layer(case)
    exact = prepare_layer(LayerCase(**(vars(case) | {"silu": False, "carrier": torch.float32}))).wanted.double()
    exact = exact * torch.sigmoid(exact)
    # exp, a sum and a quotient in float32: 4 of its steps; and half a step of the carrier.
    bound = exact.abs() * (4 * 2.0**-23 + torch.finfo(carrier).eps / 2) + torch.finfo(carrier).tiny
    assert ((prepared.run().double() - exact).abs() <= bound).all()


def test_codes_after_silu_are_within_one_step() -> None:
    prepared = prepare_layer(LayerCase(silu=True, requantize=True, channels=33, outputs=20))
    difference = (prepared.run().int() - prepared.wanted.int()).abs()
    assert int(difference.max()) <= 1 and float(difference.float().mean()) < 0.01


def test_halves_round_to_even_and_extremes_saturate() -> None:
    """An accumulator of 2 n + 1 steps of a half: every code lies on a tie."""
    x = torch.arange(-128, 128, dtype=torch.int8).view(-1, 1)
    one, nothing = torch.ones(1), torch.zeros(1, 1, dtype=torch.int32)
    arguments = (x, torch.ones(1, 1, dtype=torch.int8), one, nothing, None, None, None, None)
    grid, tail = [3, -100, 90], (False, [1, 1], "triton", [32, 32, 32, 4, 1, 0, 1], torch.int8)
    for inv_scale in (0.5, 1.5, 1e30):
        codes = torch.ops.qdiff.cuda_linear(*arguments, torch.tensor([inv_scale]), None, grid, *tail)
        wanted = torch.clamp(torch.round(x.float() * inv_scale) + 3, -100, 90)
        assert torch.equal(codes.float(), wanted)


CASES = {
    "conv2d W8": LayerCase(embedding=True, residual=True),
    "conv2d W4 requantized": LayerCase(stored="int4-shifted", requantize=True, stride=(2, 1)),
    "conv2d grouped": LayerCase(groups=2, dilation=(2, 1), carrier=torch.bfloat16),
    "linear W8": LayerCase(kernel=None, residual=True, silu=True),
    "linear W4": LayerCase(kernel=None, stored="int4", bias=False, carrier=torch.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_operator_keeps_the_contract_of_torch(name: str) -> None:
    prepared = prepare_layer(CASES[name])
    torch.library.opcheck(
        prepared.operator,
        prepared.arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
