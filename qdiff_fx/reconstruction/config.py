"""How blocks are reconstructed: frozen, validated, with presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from qdiff_fx.errors import ConfigError

GRANULARITIES = ("block", "layer")
ROUNDINGS = ("adaround", "squant")


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Learning of weight rounding (AdaRound), then of activation step sizes (LSQ), block by block.

    Args:
      weight_iterations: Adam steps a block on the rounding; 0 keeps rounding to nearest.
      weight_learning_rate: of the rounding variables, which start within 2.4 of zero; 1e-3, as published, takes
        thousands of steps to decide (decision 021).
      weight_beta1, weight_beta2: Adam's decay rates of the gradient's mean and square, for the rounding.
      activation_iterations: Adam steps a block on the step sizes; 0 keeps those of the observers.
      activation_learning_rate: of p in step = start * exp(p), cosine to 0: a relative rate (decision 020).
      batch_size: rows a step.
      regularization: weight of the rounding penalty.
      beta_start, beta_end: exponent of the penalty, annealed linearly after the warm-up.
      warmup: share of the weight iterations without penalty, in [0, 1).
      weight_exponent, activation_exponent: of the reconstruction loss |output - target|^exponent.
      early_stop: end a block once its rounding is binary.
      granularity: "block", or "layer" for the baseline that learns each layer by itself.
      rounding: "adaround", or "squant" for the baseline that flips roundings without looking at data.
      cache_bytes: memory for cached block inputs and targets; what exceeds it goes to memory-mapped files.
      seed: of the choice of rows.
    """

    weight_iterations: int = 500
    weight_learning_rate: float = 0.15
    weight_beta1: float = 0.8
    weight_beta2: float = 0.99
    activation_iterations: int = 100
    activation_learning_rate: float = 1e-2
    batch_size: int = 16
    regularization: float = 0.003
    beta_start: float = 20.0
    beta_end: float = 2.0
    warmup: float = 0.2
    weight_exponent: float = 2.0
    activation_exponent: float = 2.4
    early_stop: bool = True
    granularity: str = "block"
    rounding: str = "adaround"
    cache_bytes: int = 4 * 2**30
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("weight_iterations", "activation_iterations", "cache_bytes"):
            self._check(name, isinstance(getattr(self, name), int) and getattr(self, name) >= 0, "an integer >= 0")
        self._check("batch_size", isinstance(self.batch_size, int) and self.batch_size >= 1, "an integer >= 1")
        for name in ("weight_learning_rate", "activation_learning_rate", "beta_start", "beta_end"):
            self._check(name, getattr(self, name) > 0, "a positive number")
        self._check("regularization", self.regularization >= 0, "a number >= 0")
        for name in ("warmup", "weight_beta1", "weight_beta2"):
            self._check(name, 0 <= getattr(self, name) < 1, "a share in [0, 1)")
        for name in ("weight_exponent", "activation_exponent"):
            self._check(name, getattr(self, name) >= 1, "a number >= 1")
        self._check("granularity", self.granularity in GRANULARITIES, f"one of {', '.join(GRANULARITIES)}")
        self._check("rounding", self.rounding in ROUNDINGS, f"one of {', '.join(ROUNDINGS)}")

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ConfigError(f"ReconstructionConfig.{name}={getattr(self, name)!r}: want {wanted}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The named preset ("fast", "balanced", "full"), with fields replaced by `overrides`.

        "full" has the published iteration counts and weight learning rate.
        """
        if name not in PRESETS:
            raise ConfigError(f"reconstruction preset {name!r}: want one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    def replace(self, **changes: Any) -> Self:
        """A copy with the named fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


_PUBLISHED: Mapping[str, Any] = {"weight_beta1": 0.9, "weight_beta2": 0.999, "regularization": 0.01}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {},
    "balanced": {
        **_PUBLISHED,
        "weight_iterations": 5000,
        "weight_learning_rate": 3e-2,
        "activation_iterations": 1000,
        "batch_size": 8,
    },
    "full": {
        **_PUBLISHED,
        "weight_iterations": 20_000,
        "weight_learning_rate": 1e-3,
        "activation_iterations": 5000,
        "batch_size": 32,
        "early_stop": False,
    },
}
