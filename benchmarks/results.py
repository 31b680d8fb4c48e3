"""The published studies on the bundled models, cell by cell, resumable.

    python benchmarks/results.py --work /tmp/results
    python benchmarks/results.py --work /tmp/results --cells "method/*" --share 0.1
    python benchmarks/results.py --work /tmp/results --cells          # the page alone, from the cells that are there

Finished cells, chunks of samples and quantized models stay in the work folder. Writes docs/results-studies.json, .md
and plots. The page says which cells are missing; --share makes do with fewer samples than the full run, and the tables
say how many there are. The study of shortcut splitting takes its cells from benchmarks/quality.py.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

import qdiff_fx
from cells import matching
from provenance import origin, slug
from qdiff_fx.cli.sources import Source, open_source
from qdiff_fx.errors import QDiffWarning
from qdiff_fx.evaluation import (
    FeatureExtractor,
    FeatureStatistics,
    fashion_features,
    frechet_distance,
    from_bytes,
    inception_style_score,
    sample_in_chunks,
)
from qdiff_fx.evaluation.study import Yardstick
from qdiff_fx.safe_io import read_json, write_json
from results_arms import ARMS, facts, make
from results_page import write_page
from results_reckoning import Sampling
from results_studies import STUDIES

STEPS, CHUNK, BATCH = 20, 250, 50
"""Chunks of samples stay on the disk; networks are called with batches, always of as many rows: compiled once."""
MAIN_ARMS, MAIN_SEEDS, MAIN_SAMPLES = ("full precision", "linear RTN W4A8", "ours W8A8", "ours W4A8"), (1, 2, 3), 5000
OTHER_SEED, OTHER_SAMPLES, GUIDED_SAMPLES = 1, 2000, 500
MODELS = {"fashion-uncond": 1.0, "fashion-cond": 3.0}
"""Bundled models with the guidance scale that their card recommends."""
GUIDED_ARMS = ("full precision", "linear RTN W4A8", "ours W8A8", "ours W4A8")
SCALES = (3.0, 1.0)
COUNTS = (500, 1000, 2000, 5000)
"""Distances are taken at each of these that there are samples for: they fall with the number of samples."""


def cells() -> dict[str, Callable[[Bench], dict[str, Any]]]:
    """Every cell in order of worth: one seed of everything first."""
    found: dict[str, Callable[[Bench], dict[str, Any]]] = {}
    for seed in MAIN_SEEDS:
        for arm in MAIN_ARMS:
            found[f"method/{arm}/seed {seed}"] = _method(arm, seed, MAIN_SAMPLES)
        if seed == MAIN_SEEDS[0]:
            found |= {
                f"method/{arm}/seed {seed}": _method(arm, OTHER_SEED, OTHER_SAMPLES)
                for arm in ARMS
                if arm not in MAIN_ARMS
            }
            found |= STUDIES
            found |= {f"guidance/{scale:g}/{arm}": _guided(arm, scale) for scale in SCALES for arm in GUIDED_ARMS}
    return found


def sampling(names: Iterable[str]) -> dict[str, Sampling | None]:
    """What a full run draws for each cell; None where it draws nothing by the thousand."""
    found: dict[str, Sampling | None] = {}
    for name in names:
        kind, _, rest = name.partition("/")
        found[name] = None
        if kind == "method":
            arm = rest.partition("/")[0]
            count = MAIN_SAMPLES if arm in MAIN_ARMS else OTHER_SAMPLES
            found[name] = Sampling(arm=arm, samples=count, steps=STEPS)
        elif kind == "guidance":
            arm = rest.partition("/")[2]
            found[name] = Sampling(arm=f"guided {arm}", samples=GUIDED_SAMPLES, steps=STEPS)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of data, models, samples and finished cells")
    parser.add_argument("--cells", nargs="*", default=["*"], help="globs over cell names; nothing writes the page only")
    parser.add_argument("--share", type=float, default=1.0, help="of the samples that a full run takes (1)")
    parser.add_argument("--eager", action="store_true", help="compile nothing: better for a few hundred samples")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", QDiffWarning)  # W4A4 is doubtful; its figures are in the table
    known = cells()
    bench = Bench(arguments.work, share=arguments.share, compiled=not arguments.eager)
    for name in matching(known, arguments.cells):
        bench.run(name, known[name])
        write_page(arguments.docs, bench.rows(known), sampling(known))
    write_page(arguments.docs, bench.rows(known), sampling(known))


class Bench:
    """Data, models, samples and finished cells.

    Args:
      work: the folder of all of them.
      share: of the samples that a full run takes.
      compiled: compile networks that thousands of samples are drawn from.
    """

    def __init__(self, work: Path, *, share: float = 1.0, compiled: bool = True) -> None:
        self.work, self.share, self.compiled = work, share, compiled
        self.source = cache(open_source)
        self.yardstick = cache(self._yardstick)
        self.network = cache(self._network)
        self.extractor: Callable[[], FeatureExtractor] = cache(fashion_features)

    def path(self, name: str) -> Path:
        """Of a finished cell."""
        return self.work / "cells" / f"{slug(name)}.json"

    def rows(self, names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What is there, in order."""
        return {name: read_json(self.path(name)) for name in names if self.path(name).is_file()}

    def run(self, name: str, measure: Callable[[Bench], dict[str, Any]]) -> None:
        """Measure a cell that is not there, or that has fewer samples than are asked for now."""
        if self.path(name).is_file() and read_json(self.path(name)).get("share", 1.0) >= self.share:
            return
        started, cpu = time.monotonic(), time.process_time()
        row = measure(self)
        seed = int(row.pop("seed", 0))
        row |= {"cell": name, "seconds": time.monotonic() - started, "share": self.share} | origin(seed)
        row["cpu_seconds"] = time.process_time() - cpu
        write_json(self.path(name), row)
        print(f"{name}: {row['seconds']:.0f} s", flush=True)

    def scaled(self, count: int) -> int:
        """`count` samples times the share, in whole chunks."""
        return max(1, round(count * self.share / CHUNK)) * CHUNK

    def calibration(self, model: str, *, rows: int = 32, strategy: str = "uniform") -> qdiff_fx.CalibrationSet:
        """10 of DDIM-50's timesteps, `rows` at each."""
        return self.source(model).collect(
            guidance_scale=MODELS[model],
            num_inference_steps=50,
            num_timesteps=10,
            samples_per_timestep=rows,
            strategy=strategy,
            seed=0,
            path=self.work / f"{model}-{strategy}-{rows}",
            progress=False,
        )

    def samples(
        self, model: str, arm: str, count: int, seed: int, *, guidance: float = 1.0
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Pictures [count, 1, 28, 28] in [-1, 1], DDIM-20, and what they cost; earlier ones are taken from the disk.

        The cost: CPU milliseconds a sample and step where they are known, and the CPU seconds of this call's sampling.
        """
        source = self.source(model)
        seconds: list[float] = []

        def sample(noise: torch.Tensor) -> torch.Tensor:
            network, parts = self.network(model, arm), []
            for rows in noise.split(BATCH):
                started = time.process_time()
                parts.append(source.sampler(rows, steps=STEPS, guidance_scale=guidance)(network).images)
                seconds.append(time.process_time() - started)
            return torch.cat(parts)

        name = slug(f"{model}-{arm}-{guidance:g}-seed-{seed}")
        images = sample_in_chunks(
            sample,
            source.sample_shape,
            count=count,
            seed=seed,
            chunk=CHUNK,
            folder=self.work / "samples" / name,
            identity=name,
            description=name,
        )
        costs = self.work / "costs" / f"{name}.json"
        if len(seconds) > 1:  # the first batch compiles
            write_json(costs, {"cpu_ms": 1e3 * median(seconds[1:]) / BATCH / STEPS})
        cost = read_json(costs) if costs.is_file() else {}
        return from_bytes(images), cost | {"cpu_seconds": sum(seconds[1:])}

    def distribution(self, images: torch.Tensor) -> dict[str, Any]:
        """Distances by number of samples, and the score of all of them."""
        extractor = self.extractor()
        features, reference = extractor.extract(images), extractor.reference
        assert isinstance(reference, FeatureStatistics)
        counts = [count for count in COUNTS if count <= len(images)] or [len(images)]
        score, spread = inception_style_score(extractor.classify(images))
        return {
            "extractor": extractor.name,
            "reference": f"{reference.description} ({reference.count:,} images)",
            "samples": len(images),
            "frechet": {str(count): frechet_distance(features[:count], reference) for count in counts},
            "score": score,
            "score_spread": spread,
        }

    def integer_model(self, model: str, arm: str) -> qdiff_fx.QuantizedUNet:
        """The arm as it was saved, made if need be."""
        return qdiff_fx.load(make(arm, self.source(model), self.calibration(model), self.work))

    def _network(self, model: str, arm: str) -> Callable[..., Any]:
        if ARMS[arm].preset is None:
            unet = self.source(model).unet
            return torch.compile(unet, dynamic=False) if self.compiled else unet
        quantized = self.integer_model(model, arm)
        return quantized.compile() if self.compiled else quantized

    def _yardstick(self, model: str, guidance: float) -> Yardstick:
        source = self.source(model)
        noise = source.noise(16, 1000)
        sampler = source.sampler(noise, steps=50, guidance_scale=guidance, keep_steps=True)
        return Yardstick(source.unet, sampler, num_timesteps=13, progress=False)


def _method(arm: str, seed: int, count: int) -> Callable[[Bench], dict[str, Any]]:
    def measure(bench: Bench) -> dict[str, Any]:
        model = "fashion-uncond"
        images, cost = bench.samples(model, arm, bench.scaled(count), seed)
        row = {"arm": arm, "seed": seed, "steps": STEPS, "sampling": cost} | bench.distribution(images)
        if seed == MAIN_SEEDS[0]:
            source: Source = bench.source(model)
            row["facts"] = facts(arm, source, bench.work)
            if ARMS[arm].preset is not None:
                row |= _yardsticks(bench.yardstick(model, 1.0), bench.integer_model(model, arm))
        return row

    return measure


def _guided(arm: str, scale: float) -> Callable[[Bench], dict[str, Any]]:
    def measure(bench: Bench) -> dict[str, Any]:
        from qdiff_fx.evaluation import asked_class_share

        model, seed = "fashion-cond", OTHER_SEED
        images, cost = bench.samples(model, arm, bench.scaled(GUIDED_SAMPLES), seed, guidance=scale)
        classes = torch.arange(len(images)) % CHUNK % 10  # every chunk begins with class 0
        row = {"arm": arm, "guidance": scale, "seed": seed, "steps": STEPS, "sampling": cost}
        row |= bench.distribution(images)
        row["asked_class_share"] = asked_class_share(images, classes)
        if ARMS[arm].preset is not None:
            row |= _yardsticks(bench.yardstick(model, scale), bench.integer_model(model, arm))
        return row

    return measure


def _yardsticks(yardstick: Yardstick, network: Callable[..., Any]) -> dict[str, Any]:
    measured = yardstick.measure(network)
    return {
        "pooled_db": measured.sqnr.pooled_db,
        "median_db": measured.sqnr.median_db,
        "endpoint_db": measured.psnr.median_db,
    }


if __name__ == "__main__":
    main()
