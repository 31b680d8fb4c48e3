"""Outliers of q, k and v move into the projections; the network stays the same function."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

import qdiff_fx
from qdiff_fx.allocation.attention_factors import fold_attention_factors
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.numerics.metrics import sqnr_db

RATIO = 100.0
PLANTED = [1, 6]


def planted(unet: UNet2DModel, operand: str) -> UNet2DModel:
    """The same function with two channels of v, or of q, a hundred times larger, in every attention."""
    result = copy.deepcopy(unet)
    larger, smaller = ("to_v", None) if operand == "value" else ("to_q", "to_k")
    with torch.no_grad():
        for module in result.modules():
            if not hasattr(module, "to_v"):
                continue
            for name, factor in ((larger, RATIO), (smaller, 1.0 / RATIO)):
                if name is not None:
                    getattr(module, name).weight[PLANTED] *= factor
                    getattr(module, name).bias[PLANTED] *= factor
            if smaller is None:
                module.to_out[0].weight[:, PLANTED] /= RATIO
    return result


def attention_only() -> qdiff_fx.QDiffConfig:
    """Attentions at 8 bits, everything else untouched."""
    return qdiff_fx.QDiffConfig.preset("w8a8", weight_slack=0.0, activation_slack=0.0)


@pytest.mark.parametrize("operand", ["value", "query"])
def test_planted_outliers_are_moved_and_the_function_stays(
    unet: UNet2DModel, data: CalibrationSet, operand: str
) -> None:
    model = planted(unet, operand)
    prepared = qdiff_fx.prepare(model, attention_only()).set_mode(QuantizerMode.PASS)
    args, kwargs = data.gather(torch.arange(16))
    with torch.no_grad():
        before = prepared(*args, **kwargs).sample
        weights = [module.to_v.weight.clone() for module in model.modules() if hasattr(module, "to_v")]
        choices = fold_attention_factors(prepared.graph_module, prepared.signature, data)
        after = prepared(*args, **kwargs).sample
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    moved = [choice for choice in choices if choice.exponent is not None]
    assert len(moved) >= len(choices) // 2
    assert all(choice.gain_db > 10.0 for choice in moved if operand in choice.layers[0])
    for kept, module in zip(weights, [m for m in model.modules() if hasattr(m, "to_v")], strict=True):
        assert torch.equal(kept, module.to_v.weight)  # the user's module is not touched


def test_equalised_attention_is_as_good_as_without_outliers(unet: UNet2DModel, data: CalibrationSet) -> None:
    figures = {}
    args, kwargs = data.gather(torch.arange(len(data)))
    for name, model in (("even", unet), ("planted", planted(unet, "value"))):
        for equalize in (True, False):
            prepared = qdiff_fx.prepare(model, attention_only().replace(equalize=equalize))
            qdiff_fx.calibrate(prepared, data)
            with torch.no_grad():
                expected, result = unet(*args, **kwargs).sample, prepared(*args, **kwargs).sample
            figures[name, equalize] = sqnr_db(expected, result)
    assert figures["planted", True] > figures["even", True] - 1.0
    assert figures["planted", False] < figures["even", False] - 1.0


def test_an_attention_without_outliers_keeps_its_weights(unet: UNet2DModel, data: CalibrationSet) -> None:
    prepared = qdiff_fx.prepare(unet, attention_only())
    fold_attention_factors(prepared.graph_module, prepared.signature, data)
    again = fold_attention_factors(prepared.graph_module, prepared.signature, data)
    assert all(choice.exponent is None and "gain less than 6 dB" in choice.reason for choice in again)


class NormedAttention(nn.Module):
    """q is normalised behind its projection; the output is multiplied before its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        q = torch.nn.functional.layer_norm(self.q(sample), (8,))
        y = torch.nn.functional.scaled_dot_product_attention(q, self.k(sample), self.v(sample))
        result: torch.Tensor = self.out(torch.tanh(y))
        return result


def test_what_cannot_be_folded_is_left_alone_with_the_reason() -> None:
    sample = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    prepared = qdiff_fx.prepare(NormedAttention().eval(), attention_only(), example_inputs=(sample,))
    data = CalibrationSet.from_samples([((sample,), {})])
    value, query_key = fold_attention_factors(prepared.graph_module, prepared.signature, data)
    assert value.reason == "the output does not reach a projection through reshapes"
    assert query_key.reason == "q or k does not come from a projection of its own through reshapes"
