"""The cost of a reconstruction step, block by block, against a bare forward and backward of the same block.

    OMP_NUM_THREADS=1 python benchmarks/reconstruction.py

Both arms run alternately in the same process on minibatches of the same size: the bare one is the full-precision block
with gradients for its weights, nothing gathered, no optimiser. The fastest of `--repeats` counts: what else runs on the
machine only ever adds. Writes docs/results-reconstruction-steps.json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import qdiff_fx
from qdiff_fx.assets import load_unconditional
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.kernels.machine import describe_machine
from qdiff_fx.numerics.adaround import reconstruction_loss
from qdiff_fx.reconstruction import ReconstructionConfig
from qdiff_fx.reconstruction.adaround import BlockRounding, rounding_step
from qdiff_fx.reconstruction.cache import ActivationCache
from qdiff_fx.reconstruction.problem import BlockProblem
from qdiff_fx.reconstruction.streams import FULL, QUANTIZED, Streams
from qdiff_fx.reconstruction.subgraph import Unit, partition
from qdiff_fx.safe_io import write_bytes, write_json

ROWS = 128
WIDE = 64
"""Channels from which a block counts."""
SHORT_SECONDS = 1e-3
"""A bare step below this is python's overhead rather than the block's arithmetic."""


COMPILED = ("down_blocks.1.downsamplers.0.conv", "down_blocks.1.resnets.0", "mid_block.attentions.0")
"""Blocks of three structures, to see whether compiling a step would pay."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[8, 16, 32])
    arguments = parser.parse_args()
    runs = [
        _run(ReconstructionConfig.preset("fast", batch_size=size), arguments.repeats) for size in arguments.batch_sizes
    ]
    write_json(arguments.docs / "results-reconstruction-steps.json", {"machine": describe_machine(), "runs": runs})
    write_bytes(arguments.docs / "results-reconstruction-steps.md", _page(runs).encode())


def _run(config: ReconstructionConfig, repeats: int) -> dict[str, Any]:
    """All blocks with minibatches of `config.batch_size`."""
    pipe = load_unconditional()
    data = qdiff_fx.CalibrationSet.collect(
        pipe, num_inference_steps=50, num_timesteps=4, samples_per_timestep=ROWS // 4, progress=False
    )
    bits = qdiff_fx.QDiffConfig.preset("w4a32", weight_slack=0.0, activation_slack=0.0, equalize=False)
    prepared = qdiff_fx.prepare(pipe.unet, bits)
    qdiff_fx.calibrate(prepared, data, progress=False)
    units = partition(prepared.graph_module)
    cache = ActivationCache(config.cache_bytes)
    streams = Streams(prepared.graph_module, units, cache, batch_size=32)
    calls = (prepared.signature.flatten(call.args, call.kwargs) for call in data.batches(32))
    streams.load(prepared.signature.names, calls, len(data))
    rows = []
    for unit in units:
        streams.advance(unit, FULL, QuantizerMode.PASS)
        if unit.block is not None:
            rows.append(_measure(unit, streams, config, repeats))
            if unit.name in COMPILED:
                rows[-1] |= _compiled(unit, streams, config.batch_size, repeats)
            print(rows[-1], flush=True)
        streams.advance(unit, QUANTIZED, QuantizerMode.PASS)
        streams.release(unit)
    wide = [row for row in rows if row["channels"] >= WIDE]
    long = [row["ratio"] for row in wide if row["bare_a_second"] < 1.0 / SHORT_SECONDS]
    summary = {
        "batch_size": config.batch_size,
        "median_ratio": median(row["ratio"] for row in wide),
        "largest_ratio": max(row["ratio"] for row in wide),
        "largest_ratio_of_long_steps": max(long),
        "cache_peak_bytes_a_row": cache.peak_bytes / ROWS,
        "blocks": rows,
    }
    print({key: value for key, value in summary.items() if key != "blocks"}, flush=True)
    cache.close()
    return summary


def _page(runs: list[dict[str, Any]]) -> str:
    machine = describe_machine()
    lines = [
        "# The cost of a reconstruction step, block by block",
        "",
        f"Written by `benchmarks/reconstruction.py`: {machine['processor']}, {machine['isa']},",
        f"{machine['threads']} thread, beside other work. The ratio is the time of a step of learned rounding",
        "(gathering, forward, backward, gradient of rounding and penalty, Adam) over that of a bare forward and",
        "backward pass of the same full-precision block, which ran alternately in the same process; each arm's fastest",
        "step counts, because what else runs on the machine only ever adds. Cached bytes are those of all live tensors",
        "of both streams, a row of calibration data; peak memory is the process's largest",
        "resident size during the block, torch and all included.",
    ]
    for run in runs:
        lines += [
            "",
            f"## Minibatches of {run['batch_size']}",
            "",
            f"Blocks of {WIDE} or more channels: median ratio {run['median_ratio']:.2f}, largest "
            f"{run['largest_ratio']:.2f}; largest of those whose bare step takes {1000 * SHORT_SECONDS:g} ms or more "
            f"{run['largest_ratio_of_long_steps']:.2f}. All blocks, a step each: {_of_all(run):.2f}.",
            "",
            "| block | channels | weights | steps/s | bare/s | ratio | cached bytes a row | peak memory, MiB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['block']} | {row['channels']} | {row['weights']:,} | {row['steps_a_second']:.1f} | "
            f"{row['bare_a_second']:.1f} | {row['ratio']:.2f} | {row['cache_bytes_a_row']:,.0f} | "
            f"{row['peak_bytes'] / 2**20:.0f} |"
            for row in run["blocks"]
        ]
        compiled = [row for row in run["blocks"] if "compile_seconds" in row]
        lines += ["", "| `torch.compile` of the bare step | compilation, s | speed-up of a step |", "|---|---|---|"]
        lines += [
            f"| {row['block']} | {row['compile_seconds']:.1f} | {row['compiled_speedup']:.2f} |" for row in compiled
        ]
    return "\n".join(lines) + "\n"


def _of_all(run: dict[str, Any]) -> float:
    """The ratio of the sums: what learning all blocks costs against bare steps of all."""
    learned, bare = (sum(1.0 / row[key] for row in run["blocks"]) for key in ("steps_a_second", "bare_a_second"))
    return learned / bare


def _measure(unit: Unit, streams: Streams, config: ReconstructionConfig, repeats: int) -> dict[str, Any]:
    problem = BlockProblem(unit=unit, streams=streams, mode=QuantizerMode.PASS, exponent=2.0)
    rounding = BlockRounding(unit.weights)
    optimizer = torch.optim.Adam([rounding.variable], lr=config.weight_learning_rate, fused=True)
    order = torch.randperm(streams.rows, generator=torch.Generator().manual_seed(0))
    batches = itertools.cycle(order.split(config.batch_size))
    fixed = unit.quantized_weights

    def learn() -> None:
        rounding_step(problem, rounding, config, next(batches), fixed, config.weight_iterations // 2)
        optimizer.step()

    weights = [weight.clone().requires_grad_() for weight in unit.full_weights]
    # Rows that lie together: a step in which nothing is gathered.
    chunks = itertools.cycle(
        [slice(at, at + config.batch_size) for at in range(0, streams.rows - config.batch_size + 1, config.batch_size)]
    )

    def bare() -> None:
        rows = next(chunks)
        inputs = streams.gather(FULL, unit.inputs, rows, unit.device)
        targets = streams.gather(FULL, unit.outputs, rows, unit.device)
        outputs = unit.run(inputs, list(weights), QuantizerMode.PASS)
        pairs = zip(outputs, targets, strict=True)
        loss = torch.stack([reconstruction_loss(output, target, 2.0) for output, target in pairs]).sum()
        torch.autograd.grad(loss, weights)

    times: dict[str, list[float]] = {"learn": [], "bare": []}
    arms: dict[str, Callable[[], None]] = {"learn": learn, "bare": bare}
    reset_peak()
    for repeat in range(repeats + 2):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()
            if repeat >= 2:
                times[name].append(time.perf_counter() - started)
    return {
        "block": unit.name,
        "channels": max(_channels(weight) for weight in weights),
        "weights": sum(weight.numel() for weight in weights),
        "steps_a_second": 1.0 / min(times["learn"]),
        "bare_a_second": 1.0 / min(times["bare"]),
        "ratio": min(times["learn"]) / min(times["bare"]),
        "cache_bytes_a_row": streams.cache.memory_bytes / streams.rows,
        "peak_bytes": peak_bytes(),
    }


def _compiled(unit: Unit, streams: Streams, batch_size: int, repeats: int) -> dict[str, float]:
    """What `torch.compile` makes of the bare step, and how long it takes to get there."""
    weights = [weight.clone().requires_grad_() for weight in unit.full_weights]
    inputs = streams.gather(FULL, unit.inputs, slice(0, batch_size), unit.device)
    arms = {"eager": unit.graph_module, "compiled": torch.compile(unit.graph_module)}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            torch.autograd.grad(arm(*inputs, *weights)[0].square().sum(), weights)
            seconds[name].append(time.perf_counter() - started)
    return {
        "compile_seconds": seconds["compiled"][0],
        "compiled_speedup": min(seconds["eager"][1:]) / min(seconds["compiled"][1:]),
    }


def reset_peak() -> None:
    """Forget the highest resident size of this process so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The highest resident size since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def _channels(weight: Tensor) -> int:
    return int(weight.shape[0])


if __name__ == "__main__":
    main()
