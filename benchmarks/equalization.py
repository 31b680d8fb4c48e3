"""What channel factors and shifts do to networks without outliers: nothing may be lost, and at few bits much is won.

    python benchmarks/equalization.py --work /tmp/equalization

Writes docs/results-equalization.json and .md. Finished cells are kept in the work folder: a killed run continues.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import mean
from typing import Any

import qdiff_fx
from cells import gathered, matching
from provenance import machines, origin
from qdiff_fx.cli.sources import Source, open_source
from qdiff_fx.errors import QDiffWarning
from qdiff_fx.evaluation.intervals import Interval
from qdiff_fx.evaluation.study import Yardstick
from qdiff_fx.safe_io import read_json, write_bytes, write_json

STEPS, IMAGES, EVALUATION_SEED = 50, 48, 1000
MODELS = {"fashion-uncond": 1.0, "fashion-cond": 3.0}
"""Bundled models with their guidance scale."""

SEEDS = {"w8a8": (0, 1, 2), "w4a8": (0, 1, 2), "w4a6": (0,), "w4a4": (0,)}
"""Calibration seeds of each preset."""

ARMS = {
    "off": {"equalize": False},
    "factors": {"channel_shifts": False},
    "factors and shifts": {},
}
FIGURES = {"pooled_db": "pooled", "median_db": "median", "endpoint_db": "end point"}


@dataclass(frozen=True)
class Cell:
    """One calibration and its measurement."""

    model: str
    preset: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.preset}-{self.arm.replace(' ', '-')}-{self.seed}"


def cells() -> Iterator[Cell]:
    """Every cell, one seed of everything first."""
    for round_ in range(max(len(seeds) for seeds in SEEDS.values())):
        for model in MODELS:
            for preset, seeds in SEEDS.items():
                for arm in ARMS:
                    shifts_differ = preset != "w8a8" or arm != "factors"  # shifts are for 4-bit weights
                    if round_ < len(seeds) and shifts_differ:
                        yield Cell(model, preset, arm, seeds[round_])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of finished cells")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--cells", nargs="*", default=["*"], help="patterns of cells to measure; written are all")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", QDiffWarning)  # W4A4 is doubtful; its figures are in the table
    yardsticks: dict[str, tuple[Source, Yardstick]] = {}
    known = {cell.name: cell for cell in cells()}
    for name in matching(known, arguments.cells):
        cell, path = known[name], arguments.work / f"{name}.json"
        if not path.exists():
            if cell.model not in yardsticks:
                yardsticks[cell.model] = _yardstick(cell.model)
            write_json(path, vars(cell) | origin(cell.seed) | _measure(cell, *yardsticks[cell.model], arguments.work))
            row = read_json(path)
            print(*vars(cell).values(), " ".join(f"{row[name]:.1f}" for name in FIGURES), flush=True)
            _write(arguments.work, arguments.docs)
    _write(arguments.work, arguments.docs)


def _yardstick(model: str) -> tuple[Source, Yardstick]:
    source = open_source(model)
    noise = source.noise(IMAGES, EVALUATION_SEED)
    sampler = source.sampler(noise, steps=STEPS, guidance_scale=MODELS[model], keep_steps=True)
    return source, Yardstick(source.unet, sampler, num_timesteps=13, progress=False)


def _measure(cell: Cell, source: Source, yardstick: Yardstick, work: Path) -> dict[str, Any]:
    data = source.collect(
        guidance_scale=MODELS[cell.model],
        num_inference_steps=STEPS,
        num_timesteps=10,
        samples_per_timestep=32,
        seed=cell.seed,
        path=work / f"{cell.model}-calibration-{cell.seed}",
        progress=False,
    )
    prepared = qdiff_fx.prepare(source.unet, qdiff_fx.QDiffConfig.preset(cell.preset, **ARMS[cell.arm]))
    qdiff_fx.calibrate(prepared, data, progress=False)
    measured = yardstick.measure(prepared, "equalization")
    return {
        "pooled_db": measured.sqnr.pooled_db,
        "median_db": measured.sqnr.median_db,
        "endpoint_db": measured.psnr.median_db,
        "endpoint_by_sample": measured.psnr.by_sample,
        "images": IMAGES,
    }


def _write(work: Path, docs: Path) -> None:
    kept = docs / "results-equalization.json"
    files = [work / f"{cell.name}.json" for cell in cells()]
    finished = [read_json(file) for file in files if file.exists()]
    rows = list(gathered(finished, kept, itemgetter(*Cell.__dataclass_fields__)).values())
    write_json(kept, {"cells": rows})
    lines = [
        "# Channel factors and shifts on the bundled models, which have no planted outliers",
        "",
        "Written by `benchmarks/equalization.py`: presets with their default slacks, rounded to nearest, 320",
        f"calibration rows; means over seeds. End point: DDIM-{STEPS} from the same noise, median over samples.",
        "Change: against the row without factors, of the end point sample by sample where 48 were drawn; mean over",
        "seeds and, of several, its 95 % interval (Student's t). Commit: the row was measured at.",
        f"Machines: {machines(rows)}.",
        "",
        "| model | preset | arm | seeds | samples | pooled, dB | median, dB | end point, dB | change, dB | commit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    places = {"model": list(MODELS), "preset": list(SEEDS), "arm": list(ARMS)}
    for row in sorted(rows, key=lambda row: [order.index(row[name]) for name, order in places.items()]):
        groups.setdefault((row["model"], row["preset"], row["arm"]), []).append(row)
    for (model, preset, arm), found in groups.items():
        figures = [mean(row[name] for row in found) for name in FIGURES]
        off = groups.get((model, preset, "off"), [])
        change = " / ".join(_change(found, off, name) for name in FIGURES) if arm != "off" else "–"
        commits, images = (", ".join(sorted({str(row[name]) for row in found})) for name in ("commit", "images"))
        shown = (f"{value:.1f}" for value in figures)
        cells_ = (model, preset.upper(), arm, str(len(found)), images, *shown, change, commits)
        lines.append(f"| {' | '.join(cells_)} |")
    write_bytes(docs / "results-equalization.md", ("\n".join(lines) + "\n").encode())


def _change(rows: Sequence[dict[str, Any]], off: Sequence[dict[str, Any]], name: str) -> str:
    """Mean difference over the seeds that both have on as many samples, and half of its interval."""
    plain = {(row["seed"], row["images"]): row for row in off}
    pairs = ((row, plain.get((row["seed"], row["images"]))) for row in rows)
    differences = [_difference(row, other, name) for row, other in pairs if other is not None]
    if not differences:
        return "–"
    interval = Interval.over(differences)
    spread = "" if interval.high is None else f" ± {interval.high - interval.mean:.1f}"
    return f"{interval.mean:+.1f}{spread}"


def _difference(row: dict[str, Any], plain: dict[str, Any], name: str) -> float:
    samples = [found.get("endpoint_by_sample") for found in (row, plain)]
    if name == "endpoint_db" and all(samples):
        return mean(a - b for a, b in zip(*samples, strict=True))
    return float(row[name] - plain[name])


if __name__ == "__main__":
    main()
