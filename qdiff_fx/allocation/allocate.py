"""Spend a small budget of bytes and multiplications on the quantizers that cause most of the output error."""

from __future__ import annotations

import math
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
      multiplications: that go to the carrier type beside the bytes.
    """

    raised: Raise
    gain: float
    cost: int
    multiplications: int = 0


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


def layer_candidates(graph_module: fx.GraphModule, estimate: ErrorEstimate) -> tuple[Candidate, ...]:
    """Keeping whole layers in the carrier type: each weight, with the inputs of the layers that read it.

    An input's error counts only where no other layer reads it: the others go on quantizing it.
    """
    quantized = quantized_multiplications(graph_module)
    inputs = {
        unit.name: estimate.inputs.get(unit.target, 0.0) for unit in input_units(graph_module) if len(unit.layers) == 1
    }
    return tuple(
        Candidate(
            raised=Raise(kind="weight", target=unit.target, layers=unit.layers, bits=None),
            gain=estimate.weights[unit.target][unit.quantizer.spec.bits]
            + sum(inputs.get(layer, 0.0) for layer in unit.layers),
            cost=CARRIER_BYTES * unit.weight.numel() - unit.bytes,
            multiplications=sum(quantized.get(layer, 0) for layer in unit.layers),
        )
        for unit in weight_units(graph_module)
    )


def choose(candidates: Sequence[Candidate], budget: float, multiplications: float = math.inf) -> tuple[Candidate, ...]:
    """Greedy knapsack: most predicted error removed a share of the budgets first, as long as both hold.

    What does not fit is passed over, and so is what removes a negligible share of the error, however cheap. Ties keep
    execution order, so the result is deterministic.

    Args:
      budget: for `cost`.
      multiplications: budget for `Candidate.multiplications`.
    """

    def density(candidate: Candidate) -> float:
        share = max(1, candidate.cost) / max(1.0, budget) + candidate.multiplications / max(1.0, multiplications)
        return -candidate.gain / share

    chosen, spent, moved = [], 0.0, 0.0
    negligible = NEGLIGIBLE_SHARE * sum(max(0.0, candidate.gain) for candidate in candidates)
    for candidate in sorted(candidates, key=density):
        fits = spent + candidate.cost <= budget and moved + candidate.multiplications <= multiplications
        if candidate.gain > negligible and fits:
            chosen.append(candidate)
            spent += candidate.cost
            moved += candidate.multiplications
    return tuple(chosen)


def allocate(
    graph_module: fx.GraphModule, estimate: ErrorEstimate, *, weight_slack: float, activation_slack: float
) -> tuple[Raise, ...]:
    """The raises that pay most within the slacks, each with its reason.

    Weights below 8 bits are raised to 8. Where none is below, whole layers go to the carrier type; their inputs count
    against the activations' slack.

    Args:
      weight_slack: share of the weight bytes at the present widths.
      activation_slack: share of all multiplications of convs and linears.
    """
    total = total_multiplications(graph_module)
    byte_budget = weight_slack * sum(unit.bytes for unit in weight_units(graph_module))
    moved_budget = activation_slack * total
    weights = weight_candidates(graph_module, estimate) or layer_candidates(graph_module, estimate)
    bought = choose(weights, byte_budget, moved_budget)
    gone = {layer for item in bought if item.raised.bits is None for layer in item.raised.layers}
    inputs = [item for item in input_candidates(graph_module, estimate) if not gone.intersection(item.raised.layers)]
    bought_inputs = choose(inputs, moved_budget - sum(item.multiplications for item in bought))
    weight_error = sum(by[min(by)] for by in estimate.weights.values()) or 1.0
    input_error = sum(estimate.inputs.values()) or 1.0
    return (
        *_reasons(bought, weight_error + (input_error if gone else 0.0), lambda item: f"{item.cost:,} bytes"),
        *_reasons(bought_inputs, input_error, lambda item: f"{item.cost / total:.2%} of the multiplications"),
    )


def _reasons(bought: Sequence[Candidate], total_error: float, cost: Callable[[Candidate], str]) -> tuple[Raise, ...]:
    return tuple(
        item.raised.because(f"allocated: {item.gain / total_error:.2%} of the predicted error for {cost(item)}")
        for item in bought
    )


def _extra_bytes(unit: WeightUnit) -> int:
    return unit.bytes_at(RAISED_BITS) - unit.bytes
