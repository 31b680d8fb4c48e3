"""Attentions whose probabilities fall under half a step of their grid are found, named and kept in the carrier type."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qdiff_fx
from qdiff_fx.allocation.attention_rows import row_sum_error, ruined_probabilities
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.fake_quantize import AttentionQuantizer
from qdiff_fx.graph.edit import shared_copy
from qdiff_fx.model import PreparedUNet
from qdiff_fx.numerics.spec import probability_spec
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.prepare.raises import ApplyRaises, Raise

CHANNELS = 8


class FlatAttention(nn.Module):
    """A conv, attention over all pixels that barely prefers any, a conv."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.start, self.end = nn.Conv2d(1, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 1, 3, padding=1)
        self.value = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.sharpness = sharpness

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.start(sample)
        tokens = x.flatten(2).transpose(1, 2)
        value = self.value(x).flatten(2).transpose(1, 2)
        query = tokens * self.sharpness
        attended = nn.functional.scaled_dot_product_attention(query, tokens, value)
        y: Tensor = self.end(attended.transpose(1, 2).reshape(x.shape))
        return y


def calibrated(sharpness: float, size: int) -> tuple[PreparedUNet, qdiff_fx.CalibrationReport]:
    torch.manual_seed(0)
    net = FlatAttention(sharpness).eval()
    calls = [
        ((torch.randn(2, 1, size, size), torch.full((2,), timestep)), {}) for timestep in (10.0, 300.0, 600.0, 900.0)
    ]
    prepared = qdiff_fx.prepare(net, qdiff_fx.QDiffConfig.preset("w8a8"), example_inputs=calls[0][0])
    return prepared, qdiff_fx.calibrate(prepared, calls, progress=False)


def test_flat_attention_over_many_keys_keeps_its_softmax_in_the_carrier() -> None:
    prepared, report = calibrated(sharpness=0.01, size=32)  # probabilities of 1 / 1024 on a grid of 1 / 255
    raises = [row for row in report.raises if row["kind"] == "softmax"]
    assert len(raises) == 1
    assert raises[0]["bits"] is None
    assert "sum to 0.00 a row instead of 1" in raises[0]["reason"]
    assert report.quality["pooled_db"] > 25
    converted = qdiff_fx.convert(prepared, backend="reference", strict=True)
    row = next(row for row in converted.lowering_report().rows if "attention" in row.kernel)
    assert row.layer == raises[0]["layers"][0]


@pytest.mark.parametrize(("sharpness", "size"), [(0.01, 8), (30.0, 32)])
def test_few_keys_or_sharp_attention_stay_quantized(sharpness: float, size: int) -> None:
    _, report = calibrated(sharpness, size)
    assert not [row for row in report.raises if row["kind"] == "softmax"]


def test_a_unet_with_few_tokens_has_none(prepared: PreparedUNet, data: CalibrationSet) -> None:
    assert ruined_probabilities(prepared.graph_module, prepared.signature, data) == ()


def test_raise_leaves_a_graph_that_shares_the_quantizer_alone_and_is_applied_once() -> None:
    prepared, _ = calibrated(sharpness=0.01, size=8)
    shared = shared_copy(prepared.graph_module)
    target, quantizer = next(
        (name, module)
        for name, module in prepared.graph_module.named_modules()
        if isinstance(module, AttentionQuantizer)
    )
    decision = Raise(kind="softmax", target=target, layers=(quantizer.name,), bits=None, reason="asked")
    context = PassContext(config=prepared.qdiff_config, signature=prepared.signature)
    assert ApplyRaises((decision,)).run(shared, context).modified
    assert not ApplyRaises((decision,)).run(shared, context).modified
    assert quantizer.probabilities is not None
    assert shared.get_submodule(target).probabilities is None
    assert shared.get_submodule(target).operand("query") is quantizer.operand("query")


@given(keys=st.integers(1, 1500), bits=st.sampled_from([4, 6, 8]), masked=st.booleans())
def test_error_of_even_rows_is_that_of_one_code(keys: int, bits: int, masked: bool) -> None:
    spec = probability_spec(bits)
    query, key = torch.zeros(2, 3, 5, 4), torch.randn(2, 3, keys, 4)
    mask, seen = None, keys
    if masked:
        seen = (keys + 1) // 2
        mask = (torch.arange(keys) < seen).expand(1, 1, 5, keys)
    error, mean = row_sum_error(spec, query, key, key, mask)
    share = torch.tensor(1.0) / seen
    expected = float(torch.round(share / (1.0 / spec.qmax))) * seen / spec.qmax
    assert mean == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert error == pytest.approx(abs(expected - 1.0), rel=1e-3, abs=1e-4)
