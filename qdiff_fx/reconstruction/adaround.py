"""AdaRound for all weights of a block at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from qdiff_fx.numerics.adaround import (
    annealed_beta,
    hard_rounding,
    initial_variable,
    rounding_gradient,
    soft_rounding,
)
from qdiff_fx.reconstruction.config import ReconstructionConfig
from qdiff_fx.reconstruction.problem import BlockProblem, Convergence, minibatches
from qdiff_fx.reconstruction.result import BlockResult
from qdiff_fx.reconstruction.subgraph import UnitWeight

_BINARY = 1e-3
"""h this close to 0 or 1 counts as decided."""


class BlockRounding:
    """The rounding variables of several weights as one vector: an operation a step, however many layers.

    No autograd graph leads from the variables to the weights: `set_gradient` has the chain in closed form.

    Args:
      weights: whose rounding is learned.
    """

    def __init__(self, weights: Sequence[UnitWeight]) -> None:
        grids = [item.quantizer.rounding_grid(item.weight) for item in weights]
        self.weights = weights
        self.sizes = [item.weight.numel() for item in weights]
        self.low = torch.cat([grid.low.reshape(-1) for grid in grids])
        self.gap = torch.cat([grid.gap.reshape(-1) for grid in grids])
        self.variable = initial_variable(torch.cat([grid.fraction.reshape(-1) for grid in grids]))
        self.free = self.gap != 0
        self._flat, self._weight_gradient = torch.empty_like(self.gap), torch.empty_like(self.gap)
        self._workspace = self.gap.new_empty(4, len(self.gap))

    @torch.no_grad()
    def soft_weights(self) -> list[Tensor]:
        """The weights between their neighbours on the grid: leaves that want a gradient, good for one step."""
        rounding = soft_rounding(self.variable, out=self._workspace[0])
        parts = torch.split(torch.addcmul(self.low, rounding, self.gap, out=self._flat), self.sizes)
        return [
            part.view(item.weight.shape).to(item.weight.dtype).requires_grad_()
            for part, item in zip(parts, self.weights, strict=True)
        ]

    @torch.no_grad()
    def set_gradient(self, weight_gradients: Sequence[Tensor], regularization: float, beta: float | None) -> None:
        """Give the variables the gradient of loss and penalty, from those of the weights; see `rounding_gradient`."""
        flat = [gradient.reshape(-1).to(torch.float32) for gradient in weight_gradients]
        self.variable.grad = rounding_gradient(
            self.variable,
            torch.cat(flat, out=self._weight_gradient),
            self.gap,
            regularization=regularization,
            beta=beta,
            workspace=self._workspace,
        )

    @torch.no_grad()
    def binary(self) -> bool:
        """Whether every weight has decided."""
        rounding = soft_rounding(self.variable)
        undecided = (rounding > _BINARY) & (rounding < 1.0 - _BINARY) & self.free
        return not bool(undecided.any())

    def decisions(self) -> list[Tensor]:
        """Hard rounding, bool in the shape of each weight."""
        parts = torch.split(hard_rounding(self.variable), self.sizes)
        return [part.view(item.weight.shape).clone() for part, item in zip(parts, self.weights, strict=True)]


def learn_rounding(problem: BlockProblem, config: ReconstructionConfig, seed: int) -> BlockResult:
    """Learn the rounding of the block's weights and write it into their quantizers.

    Nagel et al. 2020, with the defaults of BRECQ and Q-Diffusion in preset "full". Departures: minibatches are drawn
    without replacement; if the learned rounding reconstructs worse than the initial one over all rows, the initial
    one stays.

    Args:
      problem: with activations in full precision, as published.
      seed: of the order of rows.
    """
    unit, started = problem.unit, time.monotonic()
    owned = [item for item in unit.weights if item.owned]
    initial_loss = problem.total_loss(unit.quantized_weights)
    if not owned or not config.weight_iterations:
        return BlockResult.unchanged(unit, "weights", initial_loss)
    before = [item.quantizer.codes(item.weight) for item in owned]
    rounding = BlockRounding(owned)
    steps_started = time.monotonic()
    iterations = _optimise(problem, rounding, config, seed)
    seconds_a_step = (time.monotonic() - steps_started) / iterations
    previous = [item.quantizer.round_up for item in owned]
    for item, decision in zip(owned, rounding.decisions(), strict=True):
        item.quantizer.round_up = decision
    learned_loss = problem.total_loss(unit.quantized_weights)
    kept = learned_loss <= initial_loss
    if not kept:
        for item, decision_before in zip(owned, previous, strict=True):
            item.quantizer.round_up = decision_before
    after = [item.quantizer.codes(item.weight) for item in owned]
    changed = sum(int((new != old).sum()) for new, old in zip(after, before, strict=True))
    return BlockResult(
        index=unit.index,
        name=unit.name,
        phase="weights",
        iterations=iterations,
        initial_loss=initial_loss,
        learned_loss=learned_loss,
        kept=kept,
        changed=changed / sum(rounding.sizes),
        seconds=time.monotonic() - started,
        seconds_a_step=seconds_a_step,
    )


def _optimise(problem: BlockProblem, rounding: BlockRounding, config: ReconstructionConfig, seed: int) -> int:
    """Adam on the rounding variables; returns the number of steps made."""
    fixed = problem.unit.quantized_weights
    betas = (config.weight_beta1, config.weight_beta2)
    optimizer = torch.optim.Adam([rounding.variable], lr=config.weight_learning_rate, betas=betas, fused=True)
    rows = minibatches(problem.streams.rows, config.batch_size, seed)
    progress = Convergence()
    for iteration, batch in enumerate(itertools.islice(rows, config.weight_iterations)):
        loss = rounding_step(problem, rounding, config, batch, fixed, iteration)
        optimizer.step()
        settled = progress.settled(loss) and iteration >= config.warmup * config.weight_iterations
        if config.early_stop and settled and rounding.binary():
            return iteration + 1
    return config.weight_iterations


def rounding_step(
    problem: BlockProblem,
    rounding: BlockRounding,
    config: ReconstructionConfig,
    batch: Tensor,
    fixed: Sequence[Tensor],
    iteration: int,
) -> float:
    """Forward and backward pass of one step: sets the gradient of the rounding variables.

    Args:
      batch: row indices.
      fixed: all weights of the unit, quantized; those that it owns are replaced by the learned ones.
      iteration: from 0.

    Returns: the reconstruction loss of the minibatch.
    """
    leaves = rounding.soft_weights()
    learned = iter(leaves)
    weights = [
        next(learned) if item.owned else weight for item, weight in zip(problem.unit.weights, fixed, strict=True)
    ]
    loss = problem.loss(batch, weights)
    gradients = torch.autograd.grad(loss, leaves)
    beta = annealed_beta(
        iteration / config.weight_iterations, warmup=config.warmup, start=config.beta_start, end=config.beta_end
    )
    rounding.set_gradient(gradients, config.regularization, beta)
    return float(loss.detach())
