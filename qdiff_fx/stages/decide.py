"""Channel factors and bit allocation."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from qdiff_fx.allocation.allocate import allocate
from qdiff_fx.allocation.attention_rows import ruined_probabilities
from qdiff_fx.allocation.channel_factors import FactorChoice, choose_channel_factors
from qdiff_fx.allocation.estimate import ErrorEstimate, estimate_errors
from qdiff_fx.allocation.units import input_units, weight_units
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.errors import CalibrationError
from qdiff_fx.model import PreparedUNet
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.prepare.raises import ApplyRaises, Raise
from qdiff_fx.stages.biases import Means

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What was decided beyond the config, with reasons.

    Args:
      factors: one entry a quantized tensor that was tried.
      raises: quantizers that were raised.
      estimate: predicted error of every quantizer, None where nothing was to be decided.
    """

    factors: tuple[FactorChoice, ...] = ()
    raises: tuple[Raise, ...] = ()
    estimate: ErrorEstimate | None = None


def decide(prepared: PreparedUNet, data: CalibrationSet, means: Means, *, progress: bool | None) -> Decisions:
    """Fold channel factors and allocate bits as the config asks; quantizers must be fitted.

    Probabilities that their grid ruins are kept in the carrier type whatever the config asks.
    """
    config, graph_module, signature = prepared.qdiff_config, prepared.graph_module, prepared.signature
    kept = ruined_probabilities(graph_module, signature, data, seed=config.seed)
    if kept:
        names = ", ".join(name for item in kept for name in item.layers)
        logger.warning("softmax stays in the carrier type, %d bits would ruin it: %s", config.softmax_bits, names)
        apply_raises(prepared, graph_module, kept)
    factors = _choose_factors(prepared, data, None, progress)
    spends = config.weight_slack > 0 or config.target_bytes is not None
    raisable = spends and bool(weight_units(graph_module))
    if not raisable and not (config.activation_slack > 0 and input_units(graph_module)):
        return Decisions(factors=factors, raises=kept)
    estimate = estimate_errors(graph_module, signature, data, means=means, seed=config.seed, progress=progress)
    raises = allocate(
        graph_module,
        estimate,
        weight_slack=_weight_slack(prepared),
        activation_slack=config.activation_slack,
    )
    apply_raises(prepared, graph_module, raises)
    widened = {layer for item in raises if item.kind == "weight" and item.bits for layer in item.layers}
    anew = _choose_factors(prepared, data, widened, progress)  # what does not pay at 4 bits may pay at 8
    judged = {layer for choice in anew for layer in choice.layers}
    factors = (*(choice for choice in factors if judged.isdisjoint(choice.layers)), *anew)
    return Decisions(factors=factors, raises=(*kept, *raises), estimate=estimate)


def _choose_factors(
    prepared: PreparedUNet, data: CalibrationSet, layers: Collection[str] | None, progress: bool | None
) -> tuple[FactorChoice, ...]:
    """Channel factors as the config asks; of the tensors that some of `layers` read, if it is given."""
    config = prepared.qdiff_config
    nothing = layers is not None and not layers
    if not config.equalize or nothing or not input_units(prepared.graph_module):
        return ()
    return choose_channel_factors(
        prepared.graph_module,
        prepared.signature,
        data,
        layers=layers,
        shifts=config.channel_shifts,
        centred=config.bias_correction,
        iterations=config.factor_iterations,
        seed=config.seed,
        progress=progress,
    )


def _weight_slack(prepared: PreparedUNet) -> float:
    """The config's slack, or what `target_bytes` leaves over the present bytes.

    Raises: CalibrationError for a limit under the present bytes.
    """
    config = prepared.qdiff_config
    if config.target_bytes is None:
        return config.weight_slack
    present = sum(unit.bytes for unit in weight_units(prepared.graph_module))
    if config.target_bytes < present:
        raise CalibrationError(
            f"target_bytes={config.target_bytes:,}: the weights' codes take {present:,} bytes at this config's widths; "
            f"raise the limit, or take a preset of fewer bits"
        )
    return config.target_bytes / max(1, present) - 1.0


def apply_raises(prepared: PreparedUNet, graph_module: fx.GraphModule, raises: tuple[Raise, ...]) -> None:
    """Give quantizers of `graph_module` their new widths."""
    context = PassContext(config=prepared.qdiff_config, signature=prepared.signature)
    ApplyRaises(raises).run(graph_module, context)
