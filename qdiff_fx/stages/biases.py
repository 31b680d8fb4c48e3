"""Biases make up for what rounding takes from the mean of a layer's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

from qdiff_fx.allocation.bias_correction import bias_corrections
from qdiff_fx.allocation.input_means import input_means
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.model import PreparedUNet
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.prepare.correct_biases import CorrectBiases

Means: TypeAlias = Mapping[str, Tensor]
"""Of layers' inputs, by node."""


def layer_input_means(prepared: PreparedUNet, data: CalibrationSet, *, progress: bool | None) -> Means:
    """Means of the inputs of the layers whose biases will be corrected; none if the config does not ask for it."""
    config = prepared.qdiff_config
    if not config.bias_correction:
        return {}
    return input_means(prepared.graph_module, prepared.signature, data, seed=config.seed, progress=progress)


def correct_biases(prepared: PreparedUNet, means: Means) -> int:
    """Correct the biases of layers whose weights are rounded to nearest; returns how many."""
    corrections = bias_corrections(prepared.graph_module, means)
    set_corrections(prepared, corrections)
    return len(corrections)


def set_corrections(prepared: PreparedUNet, corrections: Mapping[str, Tensor]) -> None:
    """Give the named layers these corrections, and take away those of all others."""
    context = PassContext(config=prepared.qdiff_config, signature=prepared.signature)
    CorrectBiases(corrections).run(prepared.graph_module, context)
