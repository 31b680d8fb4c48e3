"""What reconstruction will cost, measured on a few real steps of every block before it starts."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.errors import CalibrationError
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.reconstruction.adaround import BlockRounding, rounding_step
from qdiff_fx.reconstruction.cache import ActivationCache
from qdiff_fx.reconstruction.config import ReconstructionConfig
from qdiff_fx.reconstruction.lsq import BlockSteps
from qdiff_fx.reconstruction.problem import BlockProblem
from qdiff_fx.reconstruction.streams import FULL, QUANTIZED, Streams
from qdiff_fx.reconstruction.subgraph import Unit

_FLAT_VECTORS = 12
"""float32 vectors of a learned weight: low, gap, V, two of Adam, the soft weight, its gradient by layer and as one
vector, and the four of the workspace (the gradient of V is one)."""

_PASSES = 4
"""Forward passes a phase: both streams, and the loss before and after."""

_GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """Measured on one minibatch.

    Args:
      name: of the block.
      weight_step, activation_step: seconds a step.
      forward_row: seconds a row of a forward pass.
      row_bytes: of the live cached tensors, both streams, a calibration row.
      step_bytes: of a step: what autograd saves, and the vectors of the rounding.
    """

    name: str
    weight_step: float
    activation_step: float
    forward_row: float
    row_bytes: float
    step_bytes: int

    def seconds(self, config: ReconstructionConfig, phase: str, rows: int) -> float:
        """Of a phase over `rows` calibration rows, if no step is saved by an early stop."""
        passes = rows * self.forward_row * _PASSES
        if phase == "activations":
            return passes + self.activation_step * config.activation_iterations
        return passes + self.weight_step * config.weight_iterations


def measure_blocks(
    graph_module: fx.GraphModule,
    units: Sequence[Unit],
    input_names: Sequence[str],
    call: Sequence[Tensor],
    config: ReconstructionConfig,
    *,
    progress: bool | None = False,
) -> Mapping[int, BlockCost]:
    """The cost of every block by unit index, from real steps on the rows of `call`; nothing is learned."""
    rows = max(value.shape[0] for value in call if value.ndim)
    cache = ActivationCache(2**62)
    streams = Streams(graph_module, units, cache, batch_size=rows)
    streams.load(input_names, [call], rows)
    costs: dict[int, BlockCost] = {}
    try:
        with progress_bar("time the blocks", total=len(units), progress=progress) as bar:
            for unit in units:
                streams.advance(unit, FULL, QuantizerMode.PASS)
                if unit.block is not None:
                    costs[unit.index] = _measure(unit, streams, config)
                streams.advance(unit, QUANTIZED, QuantizerMode.PASS)
                streams.release(unit)
                bar.update(1)
    finally:
        cache.close()
    return costs


def check_memory(
    costs: Mapping[int, BlockCost], rows: int, config: ReconstructionConfig, folder: Path | None, device: torch.device
) -> None:
    """Raise CalibrationError, naming the setting to change, if a block does not fit what is free."""
    free = free_memory(device)
    for cost in costs.values():
        cached = int(cost.row_bytes * rows)
        in_memory = min(cached, config.cache_bytes)
        if free is not None and cost.step_bytes > free:
            raise CalibrationError(
                f"{cost.name}: a step on {config.batch_size} rows needs {cost.step_bytes / _GIB:.2f} GiB, "
                f"{free / _GIB:.2f} are free; lower ReconstructionConfig.batch_size"
            )
        if free is not None and in_memory + cost.step_bytes > free:
            raise CalibrationError(
                f"{cost.name}: {in_memory / _GIB:.2f} GiB of cached inputs and {cost.step_bytes / _GIB:.2f} GiB for a "
                f"step, {free / _GIB:.2f} are free; set ReconstructionConfig.cache_bytes below {free - cost.step_bytes}"
            )
        spilled = cached - in_memory
        disk = shutil.disk_usage(folder or tempfile.gettempdir()).free
        if spilled > disk:
            raise CalibrationError(
                f"{cost.name}: {spilled / _GIB:.2f} GiB of cached inputs go to {folder or tempfile.gettempdir()}, "
                f"{disk / _GIB:.2f} are free there; raise ReconstructionConfig.cache_bytes, give another "
                f"checkpoint_dir, or calibrate on fewer than {rows} samples"
            )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _measure(unit: Unit, streams: Streams, config: ReconstructionConfig) -> BlockCost:
    batch = torch.arange(min(streams.rows, config.batch_size))
    owned = [item for item in unit.weights if item.owned]
    weight_step = activation_step = 0.0
    quantized = QuantizerMode.QUANTIZE if config.activation_iterations else QuantizerMode.PASS
    started = time.monotonic()
    BlockProblem(unit=unit, streams=streams, mode=quantized, exponent=2.0).total_loss(unit.quantized_weights)
    forward_row = (time.monotonic() - started) / streams.rows
    step_bytes = 0
    if owned and config.weight_iterations and config.rounding == "adaround":
        problem = BlockProblem(unit=unit, streams=streams, mode=QuantizerMode.PASS, exponent=config.weight_exponent)
        rounding, fixed = BlockRounding(owned), unit.quantized_weights
        last = config.weight_iterations - 1
        weight_step, saved = _timed(lambda: rounding_step(problem, rounding, config, batch, fixed, last))
        step_bytes = saved + _FLAT_VECTORS * 4 * sum(rounding.sizes)
    if unit.quantizers and config.activation_iterations:
        problem = BlockProblem(
            unit=unit, streams=streams, mode=QuantizerMode.QUANTIZE, exponent=config.activation_exponent
        )
        with BlockSteps(unit.quantizers) as steps:
            weights = unit.quantized_weights
            activation_step, saved = _timed(lambda: steps.loss(problem, weights, batch).backward())  # type: ignore[no-untyped-call]
        step_bytes = max(step_bytes, saved)
    return BlockCost(
        name=unit.name,
        weight_step=weight_step,
        activation_step=activation_step,
        forward_row=forward_row,
        row_bytes=streams.cache.memory_bytes / streams.rows,
        step_bytes=step_bytes,
    )


def _timed(step: Callable[[], object]) -> tuple[float, int]:
    """Seconds of forward and backward, and bytes that autograd saved; the first of two runs warms up."""
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel() * tensor.element_size()
        return tensor

    seconds = 0.0
    for _ in range(2):
        saved, started = 0, time.monotonic()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step()
        seconds = time.monotonic() - started
    return seconds, saved
