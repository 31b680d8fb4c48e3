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
    """

    unit: Unit
    streams: Streams
    mode: QuantizerMode
    exponent: float

    def loss(self, rows: Tensor | slice, weights: Sequence[Tensor]) -> Tensor:
        """The reconstruction loss on some rows, summed over the block's outputs; differentiable in `weights`."""
        inputs = self.streams.gather(QUANTIZED, self.unit.inputs, rows, self.unit.device)
        targets = self.streams.gather(FULL, self.unit.outputs, rows, self.unit.device)
        outputs = self.unit.run(inputs, list(weights), self.mode)
        losses = [
            reconstruction_loss(output, target, self.exponent) for output, target in zip(outputs, targets, strict=True)
        ]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

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
