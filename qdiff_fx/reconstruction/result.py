"""What the reconstruction of one block did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from qdiff_fx.reconstruction.subgraph import Unit


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """One phase of one block.

    Args:
      index: of the unit, in execution order.
      name: module path.
      phase: "weights" or "activations".
      iterations: steps made; fewer than configured after an early stop.
      initial_loss, learned_loss: reconstruction loss over all rows, before and with what was learned.
      kept: whether the learned values are in use; if they were worse, the initial ones are.
      changed: share of weight codes that differ from rounding to nearest, or mean |log(step / initial step)|.
      seconds: wall time.
      seconds_a_step: of an optimisation step.
    """

    index: int
    name: str
    phase: str
    iterations: int
    initial_loss: float
    learned_loss: float
    kept: bool
    changed: float
    seconds: float
    seconds_a_step: float

    @classmethod
    def unchanged(cls, unit: Unit, phase: str, loss: float) -> Self:
        """The result of a block with nothing to learn."""
        return cls(
            index=unit.index,
            name=unit.name,
            phase=phase,
            iterations=0,
            initial_loss=loss,
            learned_loss=loss,
            kept=True,
            changed=0.0,
            seconds=0.0,
            seconds_a_step=0.0,
        )

    @property
    def final_loss(self) -> float:
        """The reconstruction loss of what is in use."""
        return self.learned_loss if self.kept else self.initial_loss

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)
