"""The cost of a reconstruction step, block by block, against a bare forward and backward of the same block.

    OMP_NUM_THREADS=1 python benchmarks/reconstruction.py --out docs/results-reconstruction-steps.json

Both arms run alternately in the same process on the same rows: the bare one is the full-precision block with gradients
for its weights, nothing else. Medians over `--repeats`.
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
from qdiff_fx.numerics.adaround import reconstruction_loss
from qdiff_fx.reconstruction import ReconstructionConfig
from qdiff_fx.reconstruction.adaround import BlockRounding, rounding_step
from qdiff_fx.reconstruction.cache import ActivationCache
from qdiff_fx.reconstruction.problem import BlockProblem
from qdiff_fx.reconstruction.streams import FULL, QUANTIZED, Streams
from qdiff_fx.reconstruction.subgraph import Unit, partition
from qdiff_fx.safe_io import write_json

ROWS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    pipe, config = load_unconditional(), ReconstructionConfig.preset("fast")
    data = qdiff_fx.CalibrationSet.collect(
        pipe, num_inference_steps=50, num_timesteps=4, samples_per_timestep=ROWS // 4, progress=False
    )
    bits = qdiff_fx.QDiffConfig.preset("w4a32", weight_slack=0.0, activation_slack=0.0, equalize=False)
    prepared = qdiff_fx.prepare(pipe.unet, bits)
    qdiff_fx.calibrate(prepared, data, progress=False)
    units = partition(prepared.graph_module)
    cache = ActivationCache(config.cache_bytes)
    streams = Streams(prepared.graph_module, units, cache, batch_size=config.batch_size)
    calls = (prepared.signature.flatten(call.args, call.kwargs) for call in data.batches(config.batch_size))
    streams.load(prepared.signature.names, calls, len(data))
    rows = []
    for unit in units:
        streams.advance(unit, FULL, QuantizerMode.PASS)
        if unit.block is not None:
            rows.append(_measure(unit, streams, config, arguments.repeats))
            print(rows[-1], flush=True)
        streams.advance(unit, QUANTIZED, QuantizerMode.PASS)
        streams.release(unit)
    wide = [row["ratio"] for row in rows if row["channels"] >= 64]
    summary = {"threads": torch.get_num_threads(), "median_ratio": median(wide), "largest_ratio": max(wide)}
    print(summary)
    write_json(arguments.out, {**summary, "cache_peak_bytes_a_row": cache.peak_bytes / ROWS, "blocks": rows})
    cache.close()


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
        "steps_a_second": 1.0 / median(times["learn"]),
        "bare_a_second": 1.0 / median(times["bare"]),
        "ratio": median(times["learn"]) / median(times["bare"]),
        "cache_bytes": streams.cache.memory_bytes,
    }


def _channels(weight: Tensor) -> int:
    return int(weight.shape[0])


if __name__ == "__main__":
    main()
