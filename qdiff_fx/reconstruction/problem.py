"""What one block has to reproduce: quantized-upstream inputs, full-precision targets, a loss, and rows in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.numerics.adaround import reconstruction_loss
from qdiff_fx.reconstruction.streams import FULL, QUANTIZED, Streams
from qdiff_fx.reconstruction.subgraph import Unit


@dataclass(frozen=True, kw_only=True)
class BlockProblem:
    """Make `unit`, fed with the quantized stream, give the outputs of the full-precision one.

    Args:
      mode: of the block's activation quantizers.
      exponent: of the loss.
      row_weights: [N], how much each row counts, of mean 1; None counts them alike.
    """

    unit: Unit
    streams: Streams
    mode: QuantizerMode
    exponent: float
    row_weights: Tensor | None = None

    def loss(self, rows: Tensor | slice, weights: Sequence[Tensor]) -> Tensor:
        """The reconstruction loss on some rows, summed over the block's outputs; differentiable in `weights`."""
        weights_of_rows = None if self.row_weights is None else self.row_weights[rows]
        losses = [
            reconstruction_loss(output, target, self.exponent, weights_of_rows)
            for output, target in self.outputs_and_targets(rows, weights)
        ]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def outputs_and_targets(self, rows: Tensor | slice, weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each output of the block on some rows, beside what it should be."""
        inputs = self.streams.gather(QUANTIZED, self.unit.inputs, rows, self.unit.device)
        targets = self.streams.gather(FULL, self.unit.outputs, rows, self.unit.device)
        return zip(self.unit.run(inputs, list(weights), self.mode), targets, strict=True)

    @torch.no_grad()
    def total_loss(self, weights: Sequence[Tensor]) -> float:
        """The loss over all rows, without gradient."""
        total = 0.0
        for chunk in self.streams.chunks():
            total += float(self.loss(chunk, weights)) * (chunk.stop - chunk.start)
        return total / self.streams.rows


def minibatches(rows: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Row indices of one minibatch after another, without end: each pass takes every row once, in a new order."""
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, batch_size)
    while True:
        order = torch.randperm(rows, generator=generator)
        for start in range(0, rows - size + 1, size):
            yield order[start : start + size]


@torch.no_grad()
def balanced_rows(problem: BlockProblem, weights: Sequence[Tensor], groups: Tensor) -> Tensor:
    """[N] row weights of mean 1 under which the rows of every group (a noise level) have the same mean loss.

    Args:
      weights: of the initial rounding; their losses are what is balanced.
      groups: [N], which group each row belongs to, integers from 0.
    """
    losses = torch.zeros(len(groups))
    for chunk in problem.streams.chunks():
        for output, target in problem.outputs_and_targets(chunk, weights):
            for row in range(len(output)):
                here = slice(row, row + 1)
                losses[chunk.start + row] += reconstruction_loss(output[here], target[here], problem.exponent).cpu()
    count = int(groups.max()) + 1
    means = torch.zeros(count).index_add_(0, groups, losses) / torch.bincount(groups, minlength=count).clamp(min=1)
    # A noise level without any error must not outweigh all others.
    chosen = 1.0 / means.clamp(min=max(1e-3 * float(means.max()), 1e-30))[groups]
    return (chosen / chosen.mean()).to(problem.unit.device)


class Convergence:
    """Whether a loss that jumps from minibatch to minibatch still falls, from the means of windows of steps."""

    WINDOW = 25
    TOLERANCE = 0.01

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0
        self._last: float | None = None

    def settled(self, loss: float) -> bool:
        """Take in the loss of a step; True at the end of a window whose mean is less than 1 % below the last one's."""
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count < self.WINDOW:
            return False
        mean, last = self._sum / self._count, self._last
        self._sum, self._count, self._last = 0.0, 0, mean
        return last is not None and mean >= (1.0 - self.TOLERANCE) * last
