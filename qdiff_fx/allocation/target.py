"""Reach a quality target with the fewest raises that a bisection finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from qdiff_fx.allocation.allocate import Candidate, input_candidates, weight_candidates
from qdiff_fx.allocation.estimate import ErrorEstimate
from qdiff_fx.allocation.units import total_multiplications, weight_units
from qdiff_fx.errors import CalibrationError
from qdiff_fx.passes.prepare.raises import Raise

MAXIMUM_EVALUATIONS = 12


@dataclass(frozen=True, kw_only=True)
class TargetResult:
    """What the bisection settled on.

    Args:
      raises: the shortest prefix of the ranked raises that reached the target.
      reached_db: its figure on the selection samples.
      evaluations: quality measurements that it took.
    """

    raises: tuple[Raise, ...]
    reached_db: float
    evaluations: int


def ranked_raises(graph_module: fx.GraphModule, estimate: ErrorEstimate) -> tuple[Raise, ...]:
    """All raises, most predicted error removed a byte first, then all weights to the carrier type.

    A multiplication that moves to the carrier type is priced like a byte by its share: keeping every input in the
    carrier costs as much as all weight bytes. Ties go to fewer multiplications or bytes, then to execution order.
    """
    total_bytes = sum(unit.bytes for unit in weight_units(graph_module))
    price = total_bytes / max(1, total_multiplications(graph_module))
    weights = [(item, float(item.cost)) for item in weight_candidates(graph_module, estimate)]
    inputs = [(item, item.cost * price) for item in input_candidates(graph_module, estimate)]
    ordered = sorted([*weights, *inputs], key=lambda pair: (-pair[0].gain / max(1.0, pair[1]), pair[1]))
    raises = [item.raised.because(_reason(item)) for item, _ in ordered]
    # What 8 bits cannot carry either: the carrier type, worst first.
    residual = sorted(
        weight_units(graph_module), key=lambda unit: -min(estimate.weights[unit.target].values()) / unit.bytes
    )
    raises += [
        Raise(kind="weight", target=unit.target, layers=unit.layers, bits=None, reason="target: carrier type")
        for unit in residual
    ]
    return tuple(raises)


def reach_target(
    raises: Sequence[Raise], measure: Callable[[Sequence[Raise]], float], target_db: float
) -> TargetResult:
    """The shortest prefix of `raises` for which `measure` is at least `target_db`, by bisection.

    Args:
      measure: output SQNR in dB with these raises applied, on selection samples; assumed to grow with the prefix.

    Raises: CalibrationError with the best figure if even all raises do not reach the target.
    """
    figures: dict[int, float] = {}

    def figure(count: int) -> float:
        if count not in figures:
            figures[count] = measure(raises[:count])
        return figures[count]

    if figure(0) >= target_db:
        return TargetResult(raises=(), reached_db=figure(0), evaluations=len(figures))
    if figure(len(raises)) < target_db:
        raise CalibrationError(
            f"target_sqnr={target_db} dB is out of reach: {max(figures.values()):.1f} dB is the best this model gives; "
            f"lower the target, or keep attention in the carrier type (attention_bits=32)"
        )
    low, high = 0, len(raises)
    while high - low > 1 and len(figures) < MAXIMUM_EVALUATIONS:
        middle = (low + high) // 2
        low, high = (low, middle) if figure(middle) >= target_db else (middle, high)
    return TargetResult(raises=tuple(raises[:high]), reached_db=figure(high), evaluations=len(figures))


def _reason(candidate: Candidate) -> str:
    unit = "bytes" if candidate.raised.kind == "weight" else "multiplications"
    return f"target: removes {candidate.gain:.2e} of relative error for {candidate.cost:,} {unit}"
