"""LSQ for all activation step sizes of a block at once."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from qdiff_fx.fake_quantize import ActivationQuantizer
from qdiff_fx.numerics.affine import QParams
from qdiff_fx.reconstruction.config import ReconstructionConfig
from qdiff_fx.reconstruction.problem import BlockProblem, minibatches
from qdiff_fx.reconstruction.result import BlockResult


class BlockSteps:
    """The step sizes of several quantizers as starts * exp(exponents), one vector each.

    As a context manager it puts the starting steps back at the end: the quantizers must not be left holding tensors of
    an autograd graph.
    """

    def __init__(self, quantizers: Sequence[ActivationQuantizer]) -> None:
        self.quantizers = quantizers
        self.starts = torch.stack([quantizer.scale.detach() for quantizer in quantizers])
        self.exponents = torch.zeros_like(self.starts, requires_grad=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.assign(self.starts)

    def loss(self, problem: BlockProblem, weights: Sequence[Tensor], rows: Tensor) -> Tensor:
        """The reconstruction loss with the present steps, differentiable in the exponents."""
        for quantizer, step in zip(self.quantizers, self.starts * torch.exp(self.exponents), strict=True):
            quantizer.scale = step
        return problem.loss(rows, weights)

    def learned(self) -> Tensor:
        """The present steps, [n], > 0."""
        return self.starts * torch.exp(self.exponents.detach())

    def assign(self, steps: Tensor) -> None:
        """Write `steps` into the quantizers; zero points stay, so a range grows and shrinks about real zero."""
        for quantizer, step in zip(self.quantizers, steps, strict=True):
            quantizer.set_qparams(QParams(step.clone(), quantizer.zero_point))


def learn_steps(problem: BlockProblem, config: ReconstructionConfig, seed: int) -> BlockResult:
    """Learn the step sizes of the block's activation quantizers and write them there; zero points stay.

    Esser et al. 2020 (LSQ). Departure: step = start * exp(p) with Adam on p, so that the rate is relative and steps
    stay positive, where the published code has the absolute rate 4e-4 for every layer (decision 020). If the learned
    steps reconstruct worse than the initial ones over all rows, the initial ones stay.

    Args:
      problem: with activations quantized and weights rounded.
      seed: of the order of rows.
    """
    unit, started = problem.unit, time.monotonic()
    weights = unit.quantized_weights
    initial_loss = problem.total_loss(weights)
    if not unit.quantizers or not config.activation_iterations:
        return BlockResult.unchanged(unit, "activations", initial_loss)
    steps_started = time.monotonic()
    with BlockSteps(unit.quantizers) as steps:
        _optimise(problem, weights, steps, config, seed)
    seconds_a_step = (time.monotonic() - steps_started) / config.activation_iterations
    steps.assign(steps.learned())
    learned_loss = problem.total_loss(weights)
    kept = learned_loss <= initial_loss
    if not kept:
        steps.assign(steps.starts)
    return BlockResult(
        index=unit.index,
        name=unit.name,
        phase="activations",
        iterations=config.activation_iterations,
        initial_loss=initial_loss,
        learned_loss=learned_loss,
        kept=kept,
        changed=float(steps.exponents.detach().abs().mean()) if kept else 0.0,
        seconds=time.monotonic() - started,
        seconds_a_step=seconds_a_step,
    )


def _optimise(
    problem: BlockProblem, weights: Sequence[Tensor], steps: BlockSteps, config: ReconstructionConfig, seed: int
) -> None:
    optimizer = torch.optim.Adam([steps.exponents], lr=config.activation_learning_rate)
    rows = minibatches(problem.streams.rows, config.batch_size, seed)
    for iteration, batch in enumerate(itertools.islice(rows, config.activation_iterations)):
        cosine = 0.5 * (1.0 + math.cos(math.pi * iteration / config.activation_iterations))
        optimizer.param_groups[0]["lr"] = config.activation_learning_rate * cosine
        optimizer.zero_grad(set_to_none=True)
        steps.loss(problem, weights, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
