"""Fake-quantize modules: what `prepare` inserts, `calibrate` fills and `convert` turns into integers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qdiff_fx.errors import CalibrationError, NonFiniteError
from qdiff_fx.numerics.adaround import RoundingGrid, rounding_grid
from qdiff_fx.numerics.affine import QParams, along_axis, check_qparams, fake_quantize
from qdiff_fx.numerics.attention import attend
from qdiff_fx.numerics.spec import QuantSpec
from qdiff_fx.numerics.weights import fake_quantize_weight, grid_weight, weight_codes
from qdiff_fx.observers import ActivationStatistics, create_observer


class QuantizerMode(Enum):
    """What a quantizer does with what passes through it."""

    OBSERVE = "observe"
    """Record ranges, pass the value on unchanged."""
    QUANTIZE = "quantize"
    """Round to the grid and back."""
    PASS = "pass"
    """Pass the value on unchanged."""


@dataclass
class NoiseLevel:
    """The noise levels of the batch that is being observed, shared by all quantizers of a model."""

    timesteps: Tensor | None = None
    """[B], or None where the model has no timestep input."""


class ActivationQuantizer(nn.Module):
    """Quantizes one activation tensor: one zero point and a scalar or per-input-channel step.

    Args:
      name: the layer or attention operand, for errors and reports.
      spec: the grid.
      channel_axis: where the channels lie, 1 for images and -1 for sequences.
    """

    scale: Tensor
    zero_point: Tensor
    channel_factor: Tensor | None

    def __init__(
        self, name: str, spec: QuantSpec, *, observer: str, channel_axis: int, noise_level: NoiseLevel, seed: int = 0
    ) -> None:
        super().__init__()
        self.name, self.spec, self.channel_axis, self.noise_level = name, spec, channel_axis, noise_level
        self.observer_name, self.seed = observer, seed
        self.mode = QuantizerMode.OBSERVE
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.register_buffer("channel_factor", None)
        self.reset()

    def reset(self) -> None:
        """Forget what was observed, and the grid that was fitted to it."""
        self.calibrated = False
        self.observer = create_observer(self.observer_name, self.spec, seed=self.seed).to(self.scale.device)
        self.observer.name = self.name
        self.statistics = ActivationStatistics(self.channel_axis).to(self.scale.device)
        self.channel_factor = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is QuantizerMode.OBSERVE:
            self.observer.observe(x)
            self.statistics.update(x, self.noise_level.timesteps)
        if self.mode is not QuantizerMode.QUANTIZE:
            return x
        factor = None if self.channel_factor is None else along_axis(self.channel_factor, x.ndim, self.channel_axis)
        return fake_quantize(x, self.scale, self.zero_point, self.spec, channel_factor=factor)

    def set_qparams(self, qparams: QParams) -> None:
        """Fix the grid. Raises QuantSpecError, naming this quantizer, if it is unusable."""
        check_qparams(qparams.scale, qparams.zero_point, self.spec, self.name)
        self.scale = qparams.scale.detach().to(self.scale.device, torch.float32)
        self.zero_point = qparams.zero_point.detach().to(self.scale.device, torch.int32)
        self.calibrated = True

    def fit(self) -> None:
        """Fix the grid from what was observed. Raises CalibrationError if nothing was."""
        if not self.observer.observed:
            raise CalibrationError(
                f"{self.name}: its input was never observed; run calibrate(prepared, data), "
                f"or the prepared model itself in your sampler, before convert()"
            )
        self.set_qparams(self.observer.qparams())


class WeightQuantizer(nn.Module):
    """Quantizes one weight [C_out, C_in / groups, ...] per output channel.

    `round_up` (bool, the weight's shape) is learned rounding: floor, or floor + 1 where True; None rounds to nearest.
    `channel_factor` and `channel_shift` [C_in] are the input channel's m_c and k_c (DESIGN: integer semantics).
    """

    scale: Tensor
    zero_point: Tensor
    channel_factor: Tensor | None
    channel_shift: Tensor | None
    round_up: Tensor | None

    def __init__(self, name: str, spec: QuantSpec, *, observer: str, groups: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.name, self.spec, self.observer_name, self.groups, self.seed = name, spec, observer, groups, seed
        self.mode = QuantizerMode.PASS
        self.calibrated = False
        self.register_buffer("scale", torch.ones(1, dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("channel_factor", None)
        self.register_buffer("channel_shift", None)
        self.register_buffer("round_up", None)

    def reset(self) -> None:
        """Forget the grid, and every choice that was made for this weight."""
        self.calibrated = False
        self.channel_factor = self.channel_shift = self.round_up = None

    def forward(self, weight: Tensor) -> Tensor:
        return self.quantized(weight) if self.mode is QuantizerMode.QUANTIZE else weight

    def quantized(self, weight: Tensor) -> Tensor:
        """`weight` rounded to the grid and back, in whatever mode this quantizer is."""
        return fake_quantize_weight(
            weight,
            self.scale,
            self.zero_point,
            self.spec,
            channel_factor=self.channel_factor,
            channel_shift=self.channel_shift,
            groups=self.groups,
            round_up=self.round_up,
        )

    def unfitted(self, spec: QuantSpec | None = None) -> WeightQuantizer:
        """Another quantizer for the same weight, without grid, factor or learned rounding; `spec` may differ."""
        result = WeightQuantizer(
            self.name, spec or self.spec, observer=self.observer_name, groups=self.groups, seed=self.seed
        )
        result.mode = self.mode
        return result.to(self.scale.device)

    def rounding_grid(self, weight: Tensor) -> RoundingGrid:
        """Both neighbours on the grid of each weight."""
        return rounding_grid(
            weight.detach(),
            self.scale,
            self.zero_point,
            self.spec,
            channel_factor=self.channel_factor,
            channel_shift=self.channel_shift,
            groups=self.groups,
        )

    def fit(self, weight: Tensor) -> None:
        """Fix the grid from the weight itself, and round to nearest.

        Raises: NonFiniteError, naming the layer, on NaN or infinity.
        """
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"{self.name}: its weight holds NaN or infinity; repair the model before prepare()")
        observer = create_observer(self.observer_name, self.spec, seed=self.seed)
        observer.name = self.name
        observer.observe(
            grid_weight(
                weight.detach(),
                channel_factor=self.channel_factor,
                channel_shift=self.channel_shift,
                groups=self.groups,
            )
        )
        qparams = observer.qparams()
        check_qparams(qparams.scale, qparams.zero_point, self.spec, self.name)
        self.scale, self.zero_point, self.round_up = qparams.scale, qparams.zero_point, None
        self.calibrated = True

    def codes(self, weight: Tensor) -> Tensor:
        """Integer codes of `weight`: uint8, or int8 for a signed grid."""
        return weight_codes(
            weight.detach(),
            self.scale,
            self.zero_point,
            self.spec,
            channel_factor=self.channel_factor,
            channel_shift=self.channel_shift,
            groups=self.groups,
            round_up=self.round_up,
        )


class AttentionQuantizer(nn.Module):
    """Scaled dot-product attention with quantized q, k, v and probabilities.

    Probabilities are unsigned with zero point 0 and scale 1 / (2^bits - 1): softmax needs no observer.
    """

    def __init__(
        self,
        name: str,
        query_key_value: QuantSpec | None,
        probabilities: QuantSpec | None,
        *,
        observer: str,
        noise_level: NoiseLevel,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.name, self.probabilities = name, probabilities
        self.mode = QuantizerMode.OBSERVE
        self.operands = nn.ModuleDict()
        if query_key_value is not None:
            for operand in ("query", "key", "value"):
                self.operands[operand] = ActivationQuantizer(
                    f"{name}.{operand}",
                    query_key_value,
                    observer=observer,
                    channel_axis=-1,
                    noise_level=noise_level,
                    seed=seed,
                )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        if self.operands:
            query, key, value = (
                self.operands[name](operand) for name, operand in (("query", query), ("key", key), ("value", value))
            )
        if self.mode is not QuantizerMode.QUANTIZE or self.probabilities is None:
            return functional.scaled_dot_product_attention(query, key, value, mask, 0.0, is_causal, scale=scale)
        return attend(query, key, value, mask, is_causal, scale, self.probabilities)

    def without_probabilities(self) -> AttentionQuantizer:
        """The same operands, shared, with probabilities in the carrier type."""
        result = copy.copy(self)
        result.probabilities = None
        return result

    def operand(self, name: str) -> ActivationQuantizer | None:
        """The quantizer of "query", "key" or "value"."""
        return cast(ActivationQuantizer, self.operands[name]) if name in self.operands else None


class BiasCorrection(nn.Module):
    """Adds to a layer's bias what rounding its weight takes from the mean of its output.

    Args:
      name: the layer, for errors and reports.
      correction: [C_out], see `qdiff_fx.allocation.bias_correction`.
    """

    correction: Tensor

    def __init__(self, name: str, correction: Tensor) -> None:
        super().__init__()
        self.name, self.mode = name, QuantizerMode.QUANTIZE
        self.register_buffer("correction", correction)

    def forward(self, bias: Tensor | None = None) -> Tensor | None:
        return self.corrected(bias) if self.mode is QuantizerMode.QUANTIZE else bias

    def corrected(self, bias: Tensor | None) -> Tensor:
        """The bias that belongs to the rounded weight, in whatever mode this is."""
        return self.correction if bias is None else bias + self.correction


@contextmanager
def preserved_modes(module: nn.Module) -> Iterator[None]:
    """Whatever the block does to the modes of the quantizers under `module`, they are afterwards what they were."""
    kinds = (ActivationQuantizer, AttentionQuantizer, WeightQuantizer, BiasCorrection)
    modes = [(child, child.mode) for child in module.modules() if isinstance(child, kinds)]
    try:
        yield
    finally:
        for child, mode in modes:
            child.mode = mode


def set_mode(module: nn.Module, mode: QuantizerMode) -> None:
    """Put every quantizer under `module` into `mode`; weights and biases are not observed, they pass instead."""
    for child in module.modules():
        if isinstance(child, (ActivationQuantizer, AttentionQuantizer)):
            child.mode = mode
        elif isinstance(child, (WeightQuantizer, BiasCorrection)):
            child.mode = QuantizerMode.PASS if mode is QuantizerMode.OBSERVE else mode
