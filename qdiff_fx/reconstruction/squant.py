"""SQuant for all weights of a block: the baseline that looks at no data."""

from __future__ import annotations

import time

from qdiff_fx.numerics.squant import squant_rounding
from qdiff_fx.reconstruction.config import ReconstructionConfig
from qdiff_fx.reconstruction.problem import BlockProblem
from qdiff_fx.reconstruction.result import BlockResult


def flip_rounding(problem: BlockProblem, config: ReconstructionConfig, seed: int) -> BlockResult:
    """Flip the rounding of the block's weights as SQuant does; kept whatever the loss says, as published."""
    unit, started = problem.unit, time.monotonic()
    owned = [item for item in unit.weights if item.owned]
    initial_loss = problem.total_loss(unit.quantized_weights)
    changed = total = 0
    for item in owned:
        before, grid = item.quantizer.codes(item.weight), item.quantizer.rounding_grid(item.weight)
        item.quantizer.round_up = squant_rounding(grid.fraction, grid.gap != 0)
        changed += int((item.quantizer.codes(item.weight) != before).sum())
        total += before.numel()
    return BlockResult(
        index=unit.index,
        name=unit.name,
        phase="weights",
        iterations=0,
        initial_loss=initial_loss,
        learned_loss=problem.total_loss(unit.quantized_weights),
        kept=True,
        changed=changed / max(1, total),
        seconds=time.monotonic() - started,
        seconds_a_step=0.0,
    )
