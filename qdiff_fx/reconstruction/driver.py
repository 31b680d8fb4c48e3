"""Reconstruct every block in execution order: rounding first, then step sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from qdiff_fx.calibration.progress import shows_progress
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.reconstruction.adaround import learn_rounding
from qdiff_fx.reconstruction.cache import ActivationCache
from qdiff_fx.reconstruction.checkpoint import BlockCheckpoint
from qdiff_fx.reconstruction.config import ReconstructionConfig
from qdiff_fx.reconstruction.estimate import check_memory, measure_blocks
from qdiff_fx.reconstruction.lsq import learn_steps
from qdiff_fx.reconstruction.problem import BlockProblem
from qdiff_fx.reconstruction.result import BlockResult
from qdiff_fx.reconstruction.squant import flip_rounding
from qdiff_fx.reconstruction.streams import FULL, QUANTIZED, Streams
from qdiff_fx.reconstruction.subgraph import Unit, partition

logger = logging.getLogger(__name__)

_FORWARD_ROWS = 32
"""Of a pass without gradients; a minibatch may be smaller."""

Calls = Callable[[], Iterable[Sequence[Tensor]]]
"""Makes a new pass over the calibration rows: the graph's flat inputs, some rows at a time."""


def reconstruct(
    graph_module: fx.GraphModule,
    input_names: Sequence[str],
    calls: Calls,
    rows: int,
    config: ReconstructionConfig,
    *,
    identity: Mapping[str, str],
    checkpoint_dir: Path | None = None,
    progress: bool | None = None,
) -> tuple[BlockResult, ...]:
    """Learn rounding and step sizes of `graph_module`, whose quantizers have their grids; returns a row a block.

    The network runs in eval mode without training anything else. Both streams of block inputs advance block by block,
    one pass over the network a phase.

    Args:
      graph_module: prepared and calibrated.
      input_names: of the graph's flat inputs.
      calls: the calibration rows.
      rows: how many there are.
      identity: what a checkpoint must agree with, beside `config`.
      checkpoint_dir: where finished blocks are kept, and cached inputs beyond `config.cache_bytes`.
      progress: show a bar; None does so on a terminal.

    Raises: CheckpointError if `checkpoint_dir` holds another reconstruction.
    """
    checkpoint = BlockCheckpoint(checkpoint_dir, {**identity, "reconstruction config": repr(config.to_dict())})
    units = partition(graph_module, config.granularity)
    learns_steps = bool(config.activation_iterations) and any(unit.quantizers for unit in units)
    learns_rounding = bool(config.weight_iterations) or config.rounding == "squant"
    phases = [*(["weights"] if learns_rounding else []), *(["activations"] if learns_steps else [])]
    costs = measure_blocks(graph_module, units, input_names, next(iter(calls())), config, progress=progress)
    device = units[0].device if units else torch.device("cpu")
    check_memory(costs, rows, config, checkpoint_dir, device)
    expected = sum(cost.seconds(config, phase, rows) for cost in costs.values() for phase in phases)
    end = datetime.now() + timedelta(seconds=expected)
    logger.info("reconstruction of %d blocks: about %.1f minutes, until %s", len(costs), expected / 60, f"{end:%H:%M}")
    results: list[BlockResult] = []
    with _progress_bar(expected, progress) as bar:
        for phase in phases:
            cache = ActivationCache(config.cache_bytes, checkpoint_dir)
            try:
                streams = Streams(graph_module, units, cache, batch_size=max(config.batch_size, _FORWARD_ROWS))
                streams.load(input_names, calls(), rows)
                for unit in units:
                    result = _reconstruct_unit(unit, phase, streams, config, checkpoint)
                    if result is not None:
                        results.append(result)
                        bar.set_postfix_str(f"{phase}, {result.name}", refresh=False)
                        bar.update(costs[unit.index].seconds(config, phase, rows))
                        logger.info("%s", result)
            finally:
                cache.close()
    return tuple(results)


def _progress_bar(expected: float, progress: bool | None) -> Any:
    """A bar over the expected seconds: blocks differ a hundredfold in cost, so counting them gives no ETA."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    title = f"reconstruct, about {expected / 60:.1f} min"
    return tqdm(
        desc=title, total=max(expected, 1e-9), bar_format=form, disable=not shows_progress(progress), leave=False
    )


def _reconstruct_unit(
    unit: Unit, phase: str, streams: Streams, config: ReconstructionConfig, checkpoint: BlockCheckpoint
) -> BlockResult | None:
    """Advance both streams over `unit`, learning in between; None where there is nothing to learn."""
    mode = QuantizerMode.PASS if phase == "weights" else QuantizerMode.QUANTIZE
    streams.advance(unit, FULL, QuantizerMode.PASS)
    streams.release_full_inputs(unit)
    result = None
    if unit.block is not None:
        result = checkpoint.restore(unit, phase)
        if result is None:
            seed = config.seed * 1_000_003 + unit.index * 2 + (phase == "activations")
            exponent = config.weight_exponent if phase == "weights" else config.activation_exponent
            problem = BlockProblem(unit=unit, streams=streams, mode=mode, exponent=exponent)
            result = _LEARNERS[phase, config.rounding](problem, config, seed)
            checkpoint.save(unit, result)
    streams.advance(unit, QUANTIZED, mode)
    streams.release(unit)
    return result


_LEARNERS: Mapping[tuple[str, str], Callable[[BlockProblem, ReconstructionConfig, int], BlockResult]] = {
    ("weights", "adaround"): learn_rounding,
    ("weights", "squant"): flip_rounding,
    ("activations", "adaround"): learn_steps,
    ("activations", "squant"): learn_steps,
}
