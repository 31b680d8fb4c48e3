"""Output quality on held-out samples, and the guard over it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import fx

from qdiff_fx.allocation.estimate import ErrorEstimate
from qdiff_fx.allocation.units import attention_quantizers, input_units, weight_units
from qdiff_fx.calibration import CalibrationBatch, CalibrationSet
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.errors import QDiffWarning
from qdiff_fx.evaluation.quality import SqnrResult, output_sqnr
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.model import PreparedUNet
from qdiff_fx.stages.finite import finite_call
from qdiff_fx.stages.fit import rows_at_a_time

GUARD_DB = 10.0
"""Output SQNR below which a result is called doubtful."""

_NAMED = 3
"""Worst layers in the warning of such a result."""

_EVALUATION_BATCH = 32


def measure_quality(prepared: PreparedUNet, held: CalibrationSet, *, progress: bool | None = False) -> SqnrResult:
    """Output SQNR of the simulated quantized network against full precision.

    Raises: NonFiniteError naming the network, the timestep and the first layer that makes NaN or infinity.
    """

    def in_mode(mode: QuantizerMode, network: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            prepared.set_mode(mode)
            return finite_call(prepared, network, *args, **kwargs)

        return call

    with progress_bar("quality", total=len(held), progress=progress) as bar:
        batches = _counted(held.batches(rows_at_a_time(prepared, held, _EVALUATION_BATCH)), bar)
        result = output_sqnr(
            in_mode(QuantizerMode.PASS, "full-precision"), in_mode(QuantizerMode.QUANTIZE, "quantized"), batches
        )
    prepared.set_mode(QuantizerMode.QUANTIZE)
    return result


def _counted(batches: Iterable[CalibrationBatch], bar: Any) -> Iterator[CalibrationBatch]:
    for batch in batches:
        yield batch
        bar.update(batch.size)


def accepted(quality: SqnrResult) -> bool:
    """Whether the result is good enough not to be warned of."""
    return min(quality.pooled_db, quality.median_db) >= GUARD_DB


def warn_of_quality(quality: SqnrResult, errors: Mapping[str, float]) -> None:
    """Say in one line how doubtful the result is, where the error comes from and what to do.

    Args:
      errors: `quantizer_errors`.
    """
    timestep = min(quality.by_timestep, key=lambda timestep: quality.by_timestep[timestep])
    worst = ", ".join(sorted(errors, key=lambda name: -errors[name])[:_NAMED])
    warnings.warn(
        f"the quantized output keeps only {quality.pooled_db:.1f} dB of SQNR pooled, {quality.median_db:.1f} dB in the "
        f"median over timesteps (want {GUARD_DB:g}); worst timestep {timestep:g}; worst layers and attentions: "
        f"{worst}; set QDiffConfig(target_sqnr=20.0), or more weight_slack or activation_slack",
        QDiffWarning,
        stacklevel=4,  # the caller of calibrate()
    )


def quantizer_errors(graph_module: fx.GraphModule, estimate: ErrorEstimate) -> dict[str, float]:
    """Predicted relative error that each layer's and attention's quantizers cause alone, at their present widths."""
    errors: dict[str, float] = {}
    for weight in weight_units(graph_module):
        by_bits = estimate.weights.get(weight.target, {})
        errors[weight.name] = errors.get(weight.name, 0.0) + by_bits.get(weight.quantizer.spec.bits, 0.0)
    for unit in input_units(graph_module):
        errors[unit.name] = errors.get(unit.name, 0.0) + estimate.inputs.get(unit.target, 0.0)
    for target, attention in attention_quantizers(graph_module):
        errors[attention.name] = estimate.attentions.get(target, 0.0)
    return errors
