"""What learned rounding and learned steps gain on the bundled unconditional model, at uniform bits.

    python benchmarks/reconstruction_quality.py --work /tmp/reconstruction

Writes docs/results-reconstruction.json and .md. Every arm that is finished is kept in the work folder, and so is every
reconstructed block: a killed run continues. `--arms` runs some only.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

import qdiff_fx
from qdiff_fx.assets import load_unconditional
from qdiff_fx.calibration.driver import weight_quantizers
from qdiff_fx.evaluation import endpoint_psnr, output_sqnr, sample_ddim
from qdiff_fx.reconstruction import ReconstructionConfig, reconstruct
from qdiff_fx.safe_io import read_json, read_tensors, write_bytes, write_json, write_tensors

STEPS, IMAGES = 50, 16
UNIFORM: dict[str, Any] = {"weight_slack": 0.0, "activation_slack": 0.0, "equalize": False}

ARMS: dict[str, dict[str, Any]] = {
    "W4A32 RTN min-max": {"bits": "w4a32", "config": {"weight_observer": "minmax"}},
    "W4A32 RTN MSE": {"bits": "w4a32"},
    "W4A32 layer AdaRound": {"bits": "w4a32", "learn": {"granularity": "layer", "activation_iterations": 0}},
    "W4A32 block AdaRound": {"bits": "w4a32", "learn": {"activation_iterations": 0}},
    "W4A8 RTN MSE": {"bits": "w4a8"},
    "W4A8 block AdaRound": {"bits": "w4a8", "rounding": "W4A32 block AdaRound"},
    "W4A8 block AdaRound + LSQ": {
        "bits": "w4a8",
        "rounding": "W4A32 block AdaRound",
        "learn": {"weight_iterations": 0},
    },
    "W4A6 block AdaRound": {"bits": "w4a6", "rounding": "W4A32 block AdaRound"},
    "W4A6 block AdaRound + LSQ": {
        "bits": "w4a6",
        "rounding": "W4A32 block AdaRound",
        "learn": {"weight_iterations": 0},
    },
}
"""`rounding` takes what another arm learned: rounding is learned with activations in full precision."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and finished arms")
    parser.add_argument("--preset", default="fast", help="of ReconstructionConfig")
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    pipe = load_unconditional()
    data, heldout = _data(pipe, arguments.work, "calibration", 52, 0), _data(pipe, arguments.work, "heldout", 26, 1)
    noise = torch.randn(IMAGES, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    reference = sample_ddim(pipe.unet, pipe.scheduler, noise, num_inference_steps=STEPS).images
    for name in arguments.arms:
        path = arguments.work / f"{_slug(name)}-{arguments.preset}.json"
        if path.exists():
            continue
        started = time.monotonic()
        prepared, blocks = _arm(name, pipe, data, arguments.work, arguments.preset)
        seconds = time.monotonic() - started
        sqnr = output_sqnr(pipe.unet, prepared, heldout.batches(32))
        images = sample_ddim(prepared, pipe.scheduler, noise, num_inference_steps=STEPS).images
        psnr = endpoint_psnr(reference, images)
        row = {
            "arm": name,
            "pooled_db": sqnr.pooled_db,
            "median_db": sqnr.median_db,
            "endpoint_db": psnr.median_db,
            "endpoint_by_sample": list(psnr.by_sample),
            "by_timestep": [[timestep, value] for timestep, value in sqnr.by_timestep.items()],
            "seconds": seconds,
            "blocks": blocks,
        }
        write_json(path, row)
        print(f"{name}: {sqnr.pooled_db:.2f} {sqnr.median_db:.2f} {psnr.median_db:.2f} in {seconds:.0f} s", flush=True)
    _write(arguments.work, arguments.docs, arguments.preset, len(data), len(heldout))


def _arm(name: str, pipe: Any, data: Any, work: Path, preset: str) -> tuple[Any, list[dict[str, Any]]]:
    arm = ARMS[name]
    config = qdiff_fx.QDiffConfig.preset(arm["bits"], **UNIFORM, **arm.get("config", {}))
    prepared = qdiff_fx.prepare(pipe.unet, config)
    qdiff_fx.calibrate(prepared, data, progress=False)
    quantizers = dict((quantizer.name, quantizer) for quantizer, _ in weight_quantizers(prepared.graph_module))
    if "rounding" in arm:
        for key, value in read_tensors(work / f"{_slug(arm['rounding'])}-{preset}.safetensors").items():
            quantizers[key].round_up = value
    blocks: list[dict[str, Any]] = []
    if "learn" in arm:
        rows = ReconstructionConfig.preset(preset, **arm["learn"])
        results = reconstruct(
            prepared.graph_module,
            prepared.signature.names,
            lambda: (prepared.signature.flatten(call.args, call.kwargs) for call in data.batches(rows.batch_size)),
            len(data),
            rows,
            identity={"calibration set": data.fingerprint, "arm": name},
            checkpoint_dir=work / "blocks" / f"{_slug(name)}-{preset}",
        )
        prepared.set_mode(qdiff_fx.fake_quantize.QuantizerMode.QUANTIZE)
        blocks = [result.to_dict() for result in results]
        learned = {key: item.round_up for key, item in quantizers.items() if item.round_up is not None}
        write_tensors(work / f"{_slug(name)}-{preset}.safetensors", learned)
    return prepared, blocks


def _data(pipe: Any, work: Path, name: str, samples: int, seed: int) -> Any:
    return qdiff_fx.CalibrationSet.collect(
        pipe,
        num_inference_steps=STEPS,
        num_timesteps=20,
        samples_per_timestep=samples,
        seed=seed,
        path=work / name,
        progress=False,
    )


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-").replace("+", "and")


def _write(work: Path, docs: Path, preset: str, rows: int, heldout: int) -> None:
    found = [read_json(path) for name in ARMS if (path := work / f"{_slug(name)}-{preset}.json").exists()]
    write_json(docs / "results-reconstruction.json", {"preset": preset, "arms": found})
    lines = [
        "# Reconstruction on the bundled unconditional model",
        "",
        f"Written by `benchmarks/reconstruction_quality.py`, preset `{preset}`, {os.cpu_count()} cores. Uniform bits",
        "but for the boundary rule: no allocation, no channel factors. "
        f"{rows} calibration rows, {heldout} held-out rows of other trajectories;",
        f"end point: DDIM-{STEPS}, {IMAGES} samples from the same noise, median. Rounding is learned once, at",
        "W4A32, and reused. Seconds of learning are summed over blocks, on a machine that may have had other work.",
        "",
        "| arm | output SQNR pooled, dB | median over timesteps, dB | end-point PSNR, dB | seconds of learning |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['arm']} | {row['pooled_db']:.1f} | {row['median_db']:.1f} | {row['endpoint_db']:.1f} | "
        f"{sum(block['seconds'] for block in row['blocks']):.0f} |"
        for row in found
    ]
    write_bytes(docs / "results-reconstruction.md", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()
