"""Against other tools on the bundled models: same inputs, same noise. Cell by cell, resumable.

    python benchmarks/peers_table.py --work /tmp/peers
    python benchmarks/peers_table.py --work /tmp/peers --cells "fashion-uncond/SDNQ*" --frechet 500

Writes docs/results-peers.json and .md from the cells that are there. A peer that cannot run a case gets its error in
the cell. Tools are found by import: pip install 'qdiff-fx[peers]', or run it in each of several environments: cells
stay in the work folder.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

import peers
from cells import matching
from peers_page import write_page
from provenance import origin, slug
from qdiff_fx.cli.sources import Source, open_source
from qdiff_fx.evaluation import compare_pictures, fashion_features, from_bytes, measure_distribution, sample_in_chunks
from qdiff_fx.evaluation.study import Yardstick
from qdiff_fx.safe_io import read_json, write_json

MODELS = {"fashion-uncond": 1.0, "fashion-cond": 3.0}
"""Bundled models with their guidance scale."""
STEPS, IMAGES, NOISE_SEED, CALIBRATION_SEED = 50, 16, 1000, 0
FRECHET_STEPS, CHUNK, FRECHET_MODELS = 20, 50, ("fashion-uncond",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of data, samples and finished cells")
    parser.add_argument("--cells", nargs="*", default=["*"], help="globs over MODEL/PEER; nothing writes the page only")
    parser.add_argument(
        "--frechet", type=int, default=0, metavar="N", help="distance of N samples, unconditional model"
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    bench = Bench(arguments.work)
    names = [f"{model}/{peer}" for peer in peers.PEERS for model in MODELS]
    for name in matching(names, arguments.cells):
        bench.run(name, arguments.frechet)
        write_page(arguments.docs, bench.rows(names), names)
    write_page(arguments.docs, bench.rows(names), names)


class Bench:
    """Data and finished cells.

    Args:
      work: the folder of all of them.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.source = cache(open_source)
        self.yardstick = cache(self._yardstick)

    def path(self, name: str) -> Path:
        """Of a finished cell."""
        return self.work / "cells" / f"{slug(name)}.json"

    def rows(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """What is there, in order."""
        return {name: read_json(self.path(name)) for name in names if self.path(name).is_file()}

    def run(self, name: str, frechet: int) -> None:
        """Measure what the cell lacks; an error becomes the cell."""
        row = read_json(self.path(name)) if self.path(name).is_file() else {}
        model, _, peer = name.partition("/")
        known = (row.get("distribution") or {}).get("samples", 0)
        lacks_distance = model in FRECHET_MODELS and frechet > known
        if row and not row["error"] and not lacks_distance:
            return
        source = self.source(model)
        row = row or {"cell": name, "model": model, "peer": peer, "error": None} | origin(NOISE_SEED) | _versions()
        row["error"] = None
        try:
            started = time.monotonic()
            network = peers.quantize(peer, source.unet, self.calls(model))
            row.setdefault("seconds_to_quantize", time.monotonic() - started)
            row |= {"bytes": network.bytes, "bits": network.bits, "share": network.bytes / _full_bytes(source)}
            if "pooled_db" not in row:
                row |= self._quality(model, network)
            if lacks_distance:
                row["distribution"] = self._distribution(name, source, network, frechet)
        except Exception as error:  # a peer may fail in any way; its error is the result
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        write_json(self.path(name), row)
        print(name, {key: row.get(key) for key in ("pooled_db", "endpoint_db", "share", "error")}, flush=True)

    def calls(self, model: str) -> peers.Calls:
        """320 calibration rows of 10 timesteps, in batches of 32."""
        data = self.source(model).collect(
            guidance_scale=MODELS[model],
            num_inference_steps=STEPS,
            num_timesteps=10,
            samples_per_timestep=32,
            seed=CALIBRATION_SEED,
            path=self.work / f"{model}-calibration",
            progress=False,
        )
        return [(call.args, dict(call.kwargs)) for call in data.batches(32)]

    def _yardstick(self, model: str) -> Yardstick:
        source = self.source(model)
        return Yardstick(source.unet, _sampler(source, IMAGES), num_timesteps=13, progress=False)

    def _quality(self, model: str, network: peers.Network) -> dict[str, Any]:
        yardstick = self.yardstick(model)
        seconds: list[float] = []
        measured = yardstick.measure(_timed(network, seconds), model)
        compared = compare_pictures(yardstick.reference.images, measured.images)
        exact = measured.sqnr.pooled_db == float("inf")
        return {
            "pooled_db": None if exact else measured.sqnr.pooled_db,
            "median_db": None if exact else measured.sqnr.median_db,
            "endpoint_db": compared.psnr_db,
            "ssim": compared.ssim,
            "by_sample": list(compared.by_picture["psnr_db"]),
            "cpu_seconds_a_step": median(seconds[-STEPS:]),
        }

    def _distribution(self, name: str, source: Source, network: peers.Network, count: int) -> dict[str, Any]:
        def sample(noise: torch.Tensor) -> torch.Tensor:
            sampler = source.sampler(noise, steps=FRECHET_STEPS, guidance_scale=MODELS[source.name])
            return sampler(network).images

        images = sample_in_chunks(
            sample,
            source.sample_shape,
            count=count,
            seed=NOISE_SEED,
            chunk=CHUNK,
            folder=self.work / "samples" / slug(name),
            identity=name,
            progress=False,
        )
        return measure_distribution(from_bytes(images), fashion_features()).to_dict() | {"steps": FRECHET_STEPS}


def _sampler(source: Source, images: int) -> Callable[..., Any]:
    noise = source.noise(images, NOISE_SEED)
    return source.sampler(noise, steps=STEPS, guidance_scale=MODELS[source.name], keep_steps=True)


def _timed(network: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        found = network(*args, **kwargs)
        seconds.append(time.process_time() - started)
        return found

    return call


def _full_bytes(source: Source) -> int:
    return 4 * sum(parameter.numel() for parameter in source.unet.parameters())


def _versions() -> Mapping[str, Any]:
    found = {}
    for package in ("sdnq", "optimum-quanto", "torchao", "nncf", "openvino", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return {"versions": found}


if __name__ == "__main__":
    main()
