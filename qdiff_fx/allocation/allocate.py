"""Spend a small budget of bytes and multiplications on the quantizers that cause most of the output error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from qdiff_fx.allocation.estimate import ErrorEstimate
from qdiff_fx.allocation.units import (
    WeightUnit,
    input_units,
    quantized_multiplications,
    total_multiplications,
    weight_units,
)
from qdiff_fx.passes.prepare.raises import Raise

RAISED_BITS = 8
CARRIER_BYTES = 4
"""Of a weight in the carrier type on disk, where models are kept in fp32."""

NEGLIGIBLE_SHARE = 1e-4
"""A raise that removes less of the predicted error than this is not worth a line in the plan."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A raise that may be bought.

    Args:
      raised: what would change.
      gain: predicted relative output error energy that it removes.
      cost: bytes for weights, multiplications for inputs.
    """

    raised: Raise
    gain: float
    cost: int


def weight_candidates(graph_module: fx.GraphModule, estimate: ErrorEstimate) -> tuple[Candidate, ...]:
    """Raising each weight below 8 bits to 8."""
    return tuple(
        Candidate(
            raised=Raise(kind="weight", target=unit.target, layers=unit.layers, bits=RAISED_BITS),
            gain=estimate.weights[unit.target][unit.quantizer.spec.bits] - estimate.weights[unit.target][RAISED_BITS],
            cost=_extra_bytes(unit),
        )
        for unit in weight_units(graph_module)
        if unit.quantizer.spec.bits < RAISED_BITS
    )


def input_candidates(graph_module: fx.GraphModule, estimate: ErrorEstimate) -> tuple[Candidate, ...]:
    """Keeping each layer input in the carrier type.

    Its layers' weights then lose their channel factors, which belong to that input: what they lose is counted.
    """
    by_layer = {layer: unit for unit in weight_units(graph_module) for layer in unit.layers}

    def lost(layer: str) -> float:
        weight = by_layer.get(layer)
        if weight is None or weight.target not in estimate.without_factor:
            return 0.0
        return estimate.without_factor[weight.target] - estimate.weights[weight.target][weight.quantizer.spec.bits]

    return tuple(
        Candidate(
            raised=Raise(kind="input", target=unit.target, layers=unit.layers, bits=None),
            gain=estimate.inputs[unit.target] - sum(max(0.0, lost(layer)) for layer in unit.layers),
            cost=unit.multiplications,
        )
        for unit in input_units(graph_module)
        if unit.target in estimate.inputs
    )


def carrier_candidates(graph_module: fx.GraphModule, estimate: ErrorEstimate, price: float) -> tuple[Candidate, ...]:
    """Keeping each weight in the carrier type, which takes its layers' inputs along; beyond its 8 bits.

    Args:
      price: bytes that a multiplication in the carrier type is worth.
    """
    quantized = quantized_multiplications(graph_module)
    return tuple(
        Candidate(
            raised=Raise(kind="weight", target=unit.target, layers=unit.layers, bits=None),
            gain=min(estimate.weights[unit.target].values()),
            cost=CARRIER_BYTES * unit.weight.numel()
            - unit.bytes_at(RAISED_BITS)
            + round(price * sum(quantized.get(layer, 0) for layer in unit.layers)),
        )
        for unit in weight_units(graph_module)
    )


def choose(candidates: Sequence[Candidate], budget: float) -> tuple[Candidate, ...]:
    """Greedy knapsack: most predicted error removed a unit of cost first, as long as the budget holds.

    What does not fit is passed over, and so is what removes a negligible share of the error, however cheap. Ties keep
    execution order, so the result is deterministic.
    """
    chosen, spent = [], 0.0
    negligible = NEGLIGIBLE_SHARE * sum(max(0.0, candidate.gain) for candidate in candidates)
    for candidate in sorted(candidates, key=_by_density):
        if candidate.gain > negligible and spent + candidate.cost <= budget:
            chosen.append(candidate)
            spent += candidate.cost
    return tuple(chosen)


def allocate(
    graph_module: fx.GraphModule, estimate: ErrorEstimate, *, weight_slack: float, activation_slack: float
) -> tuple[Raise, ...]:
    """The raises that pay most within the slacks, each with its reason.

    Args:
      weight_slack: share of the weight bytes at the present widths.
      activation_slack: share of all multiplications of convs and linears.
    """
    weights, inputs = weight_candidates(graph_module, estimate), input_candidates(graph_module, estimate)
    byte_budget = weight_slack * sum(unit.bytes for unit in weight_units(graph_module))
    total = total_multiplications(graph_module)
    bought_weights = choose(weights, byte_budget)
    bought_inputs = choose(inputs, activation_slack * total)
    weight_error = sum(by[min(by)] for by in estimate.weights.values()) or 1.0
    input_error = sum(estimate.inputs.values()) or 1.0
    return (
        *_reasons(bought_weights, weight_error, lambda item: f"{item.cost:,} bytes"),
        *_reasons(bought_inputs, input_error, lambda item: f"{item.cost / total:.2%} of the multiplications"),
    )


def _reasons(bought: Sequence[Candidate], total_error: float, cost: Callable[[Candidate], str]) -> tuple[Raise, ...]:
    return tuple(
        item.raised.because(f"allocated: {item.gain / total_error:.2%} of the predicted error for {cost(item)}")
        for item in bought
    )


def _by_density(candidate: Candidate) -> float:
    return -candidate.gain / max(1, candidate.cost)


def _extra_bytes(unit: WeightUnit) -> int:
    return unit.bytes_at(RAISED_BITS) - unit.bytes
