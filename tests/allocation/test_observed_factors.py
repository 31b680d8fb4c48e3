"""The short way: factors from what a sampler happened to show."""

import logging

import pytest
import torch
from torch import Tensor, nn

import qdiff_fx
from qdiff_fx.allocation.observed_factors import equalize_from_maxima
from qdiff_fx.allocation.units import input_units
from qdiff_fx.model import PreparedUNet
from qdiff_fx.numerics.metrics import sqnr_db


class Stream(nn.Module):
    """A convolution behind a stream with one channel a thousand times larger, whose weight undoes that."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)
        with torch.no_grad():
            self.first.weight[5] *= ratio
            self.first.bias[5] *= ratio
            self.middle.weight[:, 5] /= ratio

    def forward(self, sample: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.middle(self.first(sample))))
        return result


def observed(ratio: float, equalize: bool = True, preset: str = "w8a8") -> tuple[PreparedUNet, Tensor]:
    sample = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    module = Stream(ratio).eval()
    config = qdiff_fx.QDiffConfig.preset(preset, equalize=equalize)
    prepared = qdiff_fx.prepare(module, config, example_inputs=(sample,))
    with torch.no_grad():
        prepared(sample)
    return prepared, sample


def convert_and_measure(ratio: float, equalize: bool) -> float:
    prepared, sample = observed(ratio, equalize)
    quantized = qdiff_fx.convert(prepared, backend="reference")
    with torch.no_grad():
        return sqnr_db(Stream(ratio)(sample), quantized(sample))


def test_an_outlier_channel_is_equalised() -> None:
    assert convert_and_measure(1000.0, equalize=True) > convert_and_measure(1.0, equalize=True) - 1.0
    assert convert_and_measure(1000.0, equalize=False) < convert_and_measure(1.0, equalize=False) - 6.0


@pytest.mark.parametrize(("preset", "wanted"), [("w8a8", ["middle"]), ("w4a8", [])])
def test_a_small_gain_counts_with_eight_bits_only(preset: str, wanted: list[str]) -> None:
    prepared, _ = observed(3.0, preset=preset)  # rather even: a factor is predicted to gain less than 6 dB
    qdiff_fx.convert(prepared, backend="reference")
    units = input_units(prepared.graph_module)
    assert [layer for unit in units if unit.quantizer.channel_factor is not None for layer in unit.layers] == wanted


def test_converting_again_changes_nothing() -> None:
    prepared, sample = observed(1000.0)
    first = qdiff_fx.convert(prepared, backend="reference")
    assert equalize_from_maxima(prepared.graph_module) == ()
    second = qdiff_fx.convert(prepared, backend="reference")
    with torch.no_grad():
        assert torch.equal(first(sample), second(sample))


def test_convert_says_once_that_quality_was_not_measured(caplog: pytest.LogCaptureFixture) -> None:
    prepared, _ = observed(1.0)
    with caplog.at_level(logging.WARNING, logger="qdiff_fx"):
        qdiff_fx.convert(prepared, backend="reference")
        qdiff_fx.convert(prepared, backend="reference")
    assert len([message for message in caplog.messages if "quality was not measured" in message]) == 1
