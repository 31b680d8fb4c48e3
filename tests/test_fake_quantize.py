"""Quantizer modules: three modes, grids from what was observed, names in every error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qdiff_fx.errors import CalibrationError, NonFiniteError, QuantSpecError
from qdiff_fx.fake_quantize import (
    ActivationQuantizer,
    AttentionQuantizer,
    NoiseLevel,
    QuantizerMode,
    WeightQuantizer,
    set_mode,
)
from qdiff_fx.numerics.affine import QParams
from qdiff_fx.numerics.spec import activation_spec, probability_spec, weight_spec


def _activation(*, bits: int = 8, axis: int = 1, level: NoiseLevel | None = None) -> ActivationQuantizer:
    return ActivationQuantizer(
        "mid.conv.input",
        activation_spec(bits),
        observer="minmax",
        channel_axis=axis,
        noise_level=level or NoiseLevel(),
    )


def _quantize(module: nn.Module) -> None:
    set_mode(module, QuantizerMode.QUANTIZE)


def test_observing_and_passing_return_the_very_input() -> None:
    quantizer, x = _activation(), torch.randn(2, 3, 4, 4)
    assert quantizer.mode is QuantizerMode.OBSERVE and quantizer(x) is x and quantizer.observer.observed
    set_mode(quantizer, QuantizerMode.PASS)
    before = int(quantizer.observer.batches)
    assert quantizer(x) is x and int(quantizer.observer.batches) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizing_is_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    quantizer, x = _activation(), torch.randn(2, 3, 4, 4).to(dtype)
    quantizer(x)
    quantizer.fit()
    _quantize(quantizer)
    y = quantizer(x)
    assert y.dtype == dtype and len(y.unique()) <= 256
    # The carrier rounds the result: 2^-9 of 4 in bfloat16.
    carrier = 4 * 2.0**-9 if dtype == torch.bfloat16 else 1e-6
    assert (y.float() - x.float()).abs().max() <= float(quantizer.scale) / 2 * (1 + 1e-5) + carrier


def test_ranges_are_kept_by_noise_level() -> None:
    level = NoiseLevel()
    quantizer = _activation(level=level)
    for timestep, scale in ((5.0, 1.0), (900.0, 3.0)):
        level.timesteps = torch.full((2,), timestep)
        quantizer(scale * torch.ones(2, 3, 4, 4))
    assert [(entry.timestep, entry.maximum) for entry in quantizer.statistics.ranges()] == [(5.0, 1.0), (900.0, 3.0)]


@pytest.mark.parametrize("axis", [1, -1])
def test_a_channel_factor_widens_its_channels_step(axis: int) -> None:
    quantizer = _activation(axis=axis, bits=4)
    quantizer.set_qparams(QParams(torch.tensor(0.5), torch.tensor(8)))
    quantizer.channel_factor = torch.tensor([1.0, 4.0])
    _quantize(quantizer)
    y = quantizer(torch.full((1, 2, 2), 1.3))
    narrow, wide = y.select(axis, 0), y.select(axis, 1)
    assert torch.all(narrow == 1.5) and torch.all(wide == 2.0)


def test_fitting_before_observing_names_the_quantizer() -> None:
    with pytest.raises(CalibrationError, match=r"^mid\.conv\.input: its input was never observed"):
        _activation().fit()


def test_an_unusable_grid_names_the_quantizer() -> None:
    with pytest.raises(QuantSpecError, match=r"^mid\.conv\.input: scale 0\.0"):
        _activation().set_qparams(QParams(torch.tensor(0.0), torch.tensor(0)))


def test_resetting_forgets_observation_grid_and_factor() -> None:
    quantizer = _activation()
    quantizer(torch.randn(2, 3))
    quantizer.fit()
    quantizer.channel_factor = torch.ones(3)
    quantizer.reset()
    assert not quantizer.calibrated and not quantizer.observer.observed and quantizer.channel_factor is None
    assert quantizer.observer.name == "mid.conv.input" and not quantizer.statistics.ranges()


def _weight(bits: int, *, groups: int = 1) -> WeightQuantizer:
    return WeightQuantizer("mid.conv", weight_spec(bits), observer="minmax", groups=groups)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_weight_is_rounded_per_output_channel(bits: int) -> None:
    quantizer = _weight(bits)
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([0.01, 1.0, 10.0, 0.0]).view(-1, 1, 1, 1)
    set_mode(quantizer, QuantizerMode.OBSERVE)
    assert quantizer.mode is QuantizerMode.PASS and quantizer(weight) is weight
    quantizer.fit(weight)
    _quantize(quantizer)
    error = (quantizer(weight) - weight).abs().flatten(1).amax(1)
    assert quantizer.scale.shape == (4,) and torch.all(error <= quantizer.scale / 2 * (1 + 1e-5))
    assert error[3] == 0, "an all-zero channel stays zero"
    codes = quantizer.codes(weight)
    assert codes.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert int(codes.min()) >= quantizer.spec.qmin and int(codes.max()) <= quantizer.spec.qmax


@pytest.mark.parametrize("groups", [1, 2])
def test_factor_and_shift_leave_the_weights_value_in_place(groups: int) -> None:
    """Codes quantize W m 2^-k; what they stand for is divided by the same, so the value stays near W."""
    quantizer, weight = _weight(4, groups=groups), torch.randn(4, 4 // groups, 3, 3)
    quantizer.channel_factor = torch.tensor([0.5, 1.0, 3.0, 2.0])
    quantizer.channel_shift = torch.tensor([0, 1, 3, 2], dtype=torch.uint8)
    quantizer.fit(weight)
    _quantize(quantizer)
    multiplier = quantizer.channel_factor * torch.exp2(-quantizer.channel_shift.float())
    steps = quantizer.scale.max() / multiplier.min()
    assert (quantizer(weight) - weight).abs().max() <= steps / 2 * (1 + 1e-5)


def test_a_weight_with_nan_names_its_layer() -> None:
    with pytest.raises(NonFiniteError, match=r"^mid\.conv: its weight holds NaN or infinity"):
        _weight(4).fit(torch.tensor([[1.0, torch.nan]]))


def _attention(operands: bool = True, probabilities: bool = True) -> AttentionQuantizer:
    return AttentionQuantizer(
        "mid.attention",
        activation_spec(8) if operands else None,
        probability_spec(8) if probabilities else None,
        observer="minmax",
        noise_level=NoiseLevel(),
    )


def _operands() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6)


def test_an_observing_attention_is_full_precision_and_sees_all_operands() -> None:
    attention, operands = _attention(), _operands()
    wanted = functional.scaled_dot_product_attention(*operands)
    assert torch.equal(attention(*operands), wanted)
    names = [attention.operand(name).name for name in ("query", "key", "value")]  # type: ignore[union-attr]
    assert names == ["mid.attention.query", "mid.attention.key", "mid.attention.value"]
    assert all(attention.operand(name).observer.observed for name in ("query", "key", "value"))  # type: ignore[union-attr]


@pytest.mark.parametrize(("operands", "probabilities"), [(True, True), (False, True), (True, False)])
def test_a_quantizing_attention_is_close_but_not_equal(operands: bool, probabilities: bool) -> None:
    attention, inputs = _attention(operands, probabilities), _operands()
    wanted = attention(*inputs)
    for name in ("query", "key", "value") if operands else ():
        attention.operand(name).fit()  # type: ignore[union-attr]
    _quantize(attention)
    error = (attention(*inputs) - wanted).abs().max()
    # Steps of about 8 / 255 in operands of magnitude 4, and of 1 / 255 in seven probabilities.
    assert 0 < error < 0.25


def test_probabilities_lie_on_their_grid() -> None:
    attention = _attention(operands=False)
    _quantize(attention)
    query, key, _ = _operands()
    probabilities = attention(query, key, torch.eye(7).expand(2, 3, 7, 7))
    steps = probabilities * 255
    assert (steps - steps.round()).abs().max() < 1e-4 and probabilities.min() >= 0 and probabilities.max() <= 1
