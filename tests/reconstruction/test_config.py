"""Presets and validation of ReconstructionConfig."""

from __future__ import annotations

from typing import Any

import pytest

from qdiff_fx.errors import ConfigError
from qdiff_fx.reconstruction import ReconstructionConfig


def test_full_has_the_published_counts_and_rates() -> None:
    full = ReconstructionConfig.preset("full")
    assert (full.weight_iterations, full.weight_learning_rate) == (20_000, 1e-3)
    assert (full.activation_iterations, full.activation_exponent) == (5000, 2.4)
    assert (full.weight_beta1, full.weight_beta2) == (0.9, 0.999)
    assert (full.regularization, full.beta_start, full.beta_end, full.warmup) == (0.01, 20.0, 2.0, 0.2)


def test_what_the_presets_were_measured_with() -> None:
    """Decision 021: a change of any of these wants its table again."""
    fast, balanced = (ReconstructionConfig.preset(name) for name in ("fast", "balanced"))
    settings = ("weight_learning_rate", "weight_beta1", "weight_beta2", "batch_size", "regularization")
    assert [getattr(fast, name) for name in settings] == [0.15, 0.8, 0.99, 16, 0.003]
    assert [getattr(balanced, name) for name in settings] == [0.03, 0.9, 0.999, 8, 0.01]


def test_fast_takes_at_most_500_steps_at_a_rate_that_saturates() -> None:
    fast = ReconstructionConfig.preset("fast")
    assert fast.weight_iterations <= 500
    # |V| starts below 2.4, where h reaches 0 or 1; Adam moves at most the rate a step.
    assert fast.weight_iterations * (1 - fast.warmup) * fast.weight_learning_rate > 2.4


def test_overrides_win() -> None:
    assert ReconstructionConfig.preset("fast", batch_size=8).batch_size == 8


@pytest.mark.parametrize(
    "change",
    [
        {"weight_iterations": -1},
        {"batch_size": 0},
        {"weight_learning_rate": 0.0},
        {"warmup": 1.0},
        {"weight_beta1": 1.0},
        {"weight_beta2": -0.1},
        {"activation_exponent": 0.5},
        {"granularity": "network"},
        {"regularization": -1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_senseless_value_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        ReconstructionConfig(**change)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="fast, balanced, full"):
        ReconstructionConfig.preset("turbo")
