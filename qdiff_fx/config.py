"""What to quantize and how finely: frozen, validated and JSON-serialisable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Self

from qdiff_fx.errors import ConfigError

CARRIER_BITS = 32
"""The bit width that means "keep it in the carrier type" (the model's own fp32 or bf16)."""

OPERATORS = ("conv1d", "conv2d", "linear", "attention")

_PRESETS: Mapping[str, tuple[int, int]] = {
    "w8a8": (8, 8),
    "w4a8": (4, 8),
    "w8a32": (8, CARRIER_BITS),
    "w4a32": (4, CARRIER_BITS),
    "w4a6": (4, 6),
    "w4a4": (4, 4),
}

_PRESET_SLACKS: Mapping[str, Mapping[str, float]] = {"w8a8": {"weight_slack": 0.0}, "w8a32": {"weight_slack": 0.0}}
"""Where a preset's differ from the fields' defaults: 8-bit weights stay integers unless asked (decision 062)."""


def check_bits(name: str, bits: int) -> None:
    """Raise ConfigError unless `bits` is an integer width in [2, 8] or CARRIER_BITS."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not (2 <= bits <= 8 or bits == CARRIER_BITS):
        raise ConfigError(f"{name}={bits!r}: want an integer in 2..8, or {CARRIER_BITS} for the carrier type")


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """Overrides the bit widths of the layers whose module path and operator it matches.

    Later rules win over earlier ones, and every rule wins over the structural defaults
    (boundary layers, time embedding).

    Args:
      module: glob over dotted module paths, e.g. "up_blocks.*.attentions.*"; None matches all.
      operator: one of "conv1d", "conv2d", "linear", "attention"; None matches all.
      weight_bits: 2..8, 32 for the carrier type, None to leave the width alone.
      activation_bits: as `weight_bits`; for attention, the width of q, k and v.
    """

    module: str | None = None
    operator: str | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        if self.module is None and self.operator is None:
            raise ConfigError(
                f"{self}: want module= or operator=; QDiffConfig's own fields set what holds for every layer"
            )
        if self.operator is not None and self.operator not in OPERATORS:
            raise ConfigError(f"LayerRule(operator={self.operator!r}): want one of {', '.join(OPERATORS)}")
        if self.weight_bits is None and self.activation_bits is None:
            raise ConfigError(f"{self} changes nothing: want weight_bits= or activation_bits=")
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if bits is not None:
                check_bits(f"LayerRule.{name}", bits)
        if self.operator == "attention" and self.weight_bits is not None:
            raise ConfigError(f"{self}: attention has no weights; set activation_bits only")

    def matches(self, module: str, operator: str) -> bool:
        """Whether the rule covers the layer at this module path with this operator."""
        return (self.operator is None or self.operator == operator) and (
            self.module is None or fnmatchcase(module, self.module)
        )


@dataclass(frozen=True, kw_only=True)
class QDiffConfig:
    """How `prepare` quantizes a model.

    Args:
      weight_bits: width of conv and linear weights, per output channel: 2..8, or 32 for the carrier type.
      activation_bits: width of conv and linear inputs, per tensor: 2..8, or 32 for the carrier type.
      attention_bits: width of q, k and v of every attention; None follows `activation_bits`.
      softmax_bits: width of the attention probabilities (unsigned, zero point 0).
      split_shortcuts: give each operand of a channel cat its own quantizers (Q-Diffusion, section 4.2).
      quantize_boundaries: also quantize the inputs of the layers that read the noisy sample and of the one that
        makes the output, as the published code does; for ablations (it costs 11 dB of pooled SQNR at W8A8).
      weight_observer, activation_observer: names in `qdiff_fx.observers.OBSERVERS`.
      rules: overrides by module path or operator; a rule that matches nothing warns.
      weight_slack: share of uniform weight bytes that calibrate may spend on raising weights below 8 bits to 8, or,
        where none is below, on keeping whole layers in the carrier type; presets "w8a8" and "w8a32" have 0.
      activation_slack: share of the multiplications whose inputs calibrate may keep in the carrier type.
      equalize: let calibrate fold channel factors into weights and activation steps where they lower a layer's error.
      channel_shifts: let 4-bit weights take powers of two of those factors as shifts, up to 8x, exact in int8.
      factor_iterations: steps of learning that refine each channel factor before rounding is learned; 0 keeps the
        closed form. What is learned is kept only where it lowers the error.
      bias_correction: let calibrate add to biases what rounding a weight to nearest takes from the output's mean
        (Nagel et al. 2019, section 4.2); learned rounding is left as it was learned.
      target_sqnr: output SQNR in dB, median over timesteps, that calibrate reaches by raising layers, with
        95 % confidence on other samples; None is off.
      target_bytes: limit of the weights' codes in bytes, without scales and layers left alone; calibrate spends up to
        it on raises to 8 bits, and fails if the codes take more already. `target_sqnr` may go beyond it; None is off.
      sample_input: name of the graph input that holds the noisy sample; None takes the first 4-D input.
      seed: of every random choice (reservoir sampling in observers).
    """

    weight_bits: int = 4
    activation_bits: int = 8
    attention_bits: int | None = None
    softmax_bits: int = 8
    split_shortcuts: bool = True
    quantize_boundaries: bool = False
    weight_observer: str = "mse"
    activation_observer: str = "mse"
    weight_slack: float = 0.06
    activation_slack: float = 0.02
    equalize: bool = True
    channel_shifts: bool = True
    factor_iterations: int = 0
    bias_correction: bool = True
    target_sqnr: float | None = None
    target_bytes: int | None = None
    rules: tuple[LayerRule, ...] = ()
    sample_input: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_bits("activation_bits", self.activation_bits)
        check_bits("softmax_bits", self.softmax_bits)
        if self.attention_bits is not None:
            check_bits("attention_bits", self.attention_bits)
        for name in ("weight_slack", "activation_slack"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: want a share in 0..1; 0 switches allocation off")
        if not isinstance(self.factor_iterations, int) or self.factor_iterations < 0:
            raise ConfigError(f"factor_iterations={self.factor_iterations!r}: want a whole number of 0 or more")
        if self.target_sqnr is not None and not 0.0 < self.target_sqnr < 100.0:
            raise ConfigError(f"target_sqnr={self.target_sqnr!r}: want dB in (0, 100), or None")
        if self.target_bytes is not None and self.target_bytes <= 0:
            raise ConfigError(f"target_bytes={self.target_bytes!r}: want a positive number of bytes, or None")
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, LayerRule) for rule in self.rules):
            raise ConfigError(f"rules={self.rules!r}: want a tuple of LayerRule")
        seen: dict[tuple[str | None, str | None], LayerRule] = {}
        for rule in self.rules:
            other = seen.setdefault((rule.module, rule.operator), rule)
            if other != rule:
                raise ConfigError(f"contradictory rules for the same layers: {other} and {rule}; keep one")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The named preset ("w8a8", "w4a8", "w8a32", "w4a32", "w4a6", "w4a4"), with fields replaced by `overrides`."""
        if name not in _PRESETS:
            raise ConfigError(f"preset {name!r}: want one of {', '.join(_PRESETS)}")
        weight_bits, activation_bits = _PRESETS[name]
        widths: dict[str, Any] = {"weight_bits": weight_bits, "activation_bits": activation_bits}
        return cls(**{**widths, **_PRESET_SLACKS.get(name, {}), **overrides})

    @property
    def query_key_value_bits(self) -> int:
        """Width of q, k and v of every attention that no rule names."""
        return self.activation_bits if self.attention_bits is None else self.attention_bits

    def replace(self, **changes: Any) -> Self:
        """A copy with the named fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` restores an equal config."""
        return asdict(self) | {"rules": [asdict(rule) for rule in self.rules]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The config that `to_dict` wrote. Raises ConfigError on unknown fields or values."""
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise ConfigError(f"unknown config fields {sorted(unknown)}; written by a newer version?")
        try:
            rules = tuple(LayerRule(**rule) for rule in data.get("rules", ()))
        except TypeError as error:
            raise ConfigError(f"rules: {error}") from error
        return cls(**{**data, "rules": rules})
