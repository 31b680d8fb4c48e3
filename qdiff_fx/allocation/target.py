"""Reach a quality target with the fewest raises that a bisection finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from qdiff_fx.allocation.allocate import Candidate, carrier_candidates, input_candidates, weight_candidates
from qdiff_fx.allocation.estimate import ErrorEstimate
from qdiff_fx.allocation.units import layer_multiplications, total_multiplications, weight_units
from qdiff_fx.errors import CalibrationError
from qdiff_fx.passes.prepare.raises import Raise

MAXIMUM_EVALUATIONS = 12


@dataclass(frozen=True, kw_only=True)
class TargetResult:
    """What the bisection settled on.

    Args:
      raises: the shortest prefix of the ranked raises that reached the target.
      reached_db: its figure on the selection samples, as `measure` gave it.
      evaluations: quality measurements that it took.
    """

    raises: tuple[Raise, ...]
    reached_db: float
    evaluations: int


def ranked_raises(graph_module: fx.GraphModule, estimate: ErrorEstimate) -> tuple[Raise, ...]:
    """All raises, most predicted error removed a byte first.

    A multiplication that moves to the carrier type is priced like a byte by its share: keeping every input in the
    carrier costs as much as all weight bytes. A weight that goes to the carrier type pays for the multiplications that
    go with it, and comes behind its own raise to 8 bits. Ties go to layers with more multiplications, then to execution
    order.
    """
    total_bytes = sum(unit.bytes for unit in weight_units(graph_module))
    price = total_bytes / max(1, total_multiplications(graph_module))
    widened = [_priced(item, 1.0) for item in weight_candidates(graph_module, estimate)]
    inputs = [_priced(item, price) for item in input_candidates(graph_module, estimate)]
    density = {item.raised.target: item.density for item in widened}
    floats = [
        replace(item, density=min(item.density, density.get(item.raised.target, item.density)))
        for item in (_priced(item, 1.0) for item in carrier_candidates(graph_module, estimate, price))
    ]
    by_layer = layer_multiplications(graph_module)

    def rank(item: _Priced) -> tuple[float, int]:
        return -item.density, -sum(by_layer[layer] for layer in item.raised.layers)

    ordered = sorted([*widened, *inputs, *floats], key=rank)
    return tuple(item.raised.because(item.reason) for item in ordered)


@dataclass(frozen=True, kw_only=True)
class _Priced:
    """A raise with its reason and the predicted error that it removes a byte."""

    raised: Raise
    reason: str
    density: float


def _priced(candidate: Candidate, price: float) -> _Priced:
    kind, bits = candidate.raised.kind, candidate.raised.bits
    unit = "multiplications" if kind == "input" else "bytes"
    to = " in the carrier type" if kind == "weight" and bits is None else ""
    return _Priced(
        raised=candidate.raised,
        reason=f"target{to}: removes {candidate.gain:.2e} of relative error for {candidate.cost:,} {unit}",
        density=candidate.gain / max(1.0, candidate.cost * price),
    )


def reach_target(
    raises: Sequence[Raise], measure: Callable[[Sequence[Raise]], float], target_db: float
) -> TargetResult:
    """The shortest prefix of `raises` for which `measure` is at least `target_db`, by bisection.

    Args:
      measure: output SQNR in dB that is sure with these raises applied, on selection samples; assumed to grow with
        the prefix.

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
            f"target_sqnr={target_db} dB is out of reach: {max(figures.values()):.1f} dB is the best that this model "
            f"is sure to give; lower the target, or keep attention in the carrier type (attention_bits=32)"
        )
    low, high = 0, len(raises)
    while high - low > 1 and len(figures) < MAXIMUM_EVALUATIONS:
        middle = (low + high) // 2
        low, high = (low, middle) if figure(middle) >= target_db else (middle, high)
    return TargetResult(raises=tuple(raises[:high]), reached_db=figure(high), evaluations=len(figures))
