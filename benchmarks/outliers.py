"""Outlier channels planted into the bundled models without changing their function, and what quantization leaves.

    python benchmarks/outliers.py --work /tmp/outliers

Writes docs/results-outliers.json and .md. Finished rows are kept in the work folder: a killed run continues.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import astuple, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

import qdiff_fx
from cells import Row, gathered, matching
from planting import CONSTANT, CONSTANT_RATIO, PLANTED, plant, samples
from provenance import commits, machines, origin
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.cli.sources import open_source
from qdiff_fx.errors import QDiffWarning
from qdiff_fx.safe_io import read_json, write_bytes, write_json

MODELS = {"fashion-uncond": 1.0, "fashion-cond": 3.0}
"""Bundled models with their guidance scale."""

RATIOS = (10, 100, 1000)
PAGE = "results-outliers.json"
RUINED_DB = 10.0
_SHOWN = 16
ARMS = ("equalised", "plain", "target")
PLAIN = {"weight_slack": 0.0, "activation_slack": 0.0, "equalize": False, "bias_correction": False}


@dataclass(frozen=True)
class Cell:
    """One planted and quantized network."""

    model: str
    planted: str
    ratio: int
    preset: str
    arm: str

    @property
    def name(self) -> str:
        return "-".join(str(item).replace(" ", "-") for item in vars(self).values())


def cells(model: str) -> Iterator[Cell]:
    """Every cell of a model, those without plants first: others are compared with them."""
    for preset in ("w8a8", "w4a8"):
        for arm in ("equalised", "plain"):
            yield Cell(model, "none", 1, preset, arm)
    for name in PLANTED:
        if name == "GEGLU" and model == "fashion-uncond":
            continue  # it has none
        for preset in ("w8a8", "w4a8"):
            for arm in ("equalised", "plain"):
                yield Cell(model, name, RATIOS[-1], preset, arm)
        for ratio in RATIOS[:-1]:
            yield Cell(model, name, ratio, "w8a8", "equalised")
    for arm in ARMS:
        yield Cell(model, CONSTANT, CONSTANT_RATIO, "w8a8", arm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of finished rows")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--cells", nargs="*", default=["*"], help="patterns of rows to measure; written are all")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", QDiffWarning)  # ruined models are the point; their figures are in the table
    known = {cell.name: cell for model in arguments.models for cell in cells(model)}
    chosen = [known[name] for name in matching(known, arguments.cells)]
    for model in dict.fromkeys(cell.model for cell in chosen):
        source = open_source(model)
        data, held = samples(source, MODELS[model], arguments.work)
        for cell in (cell for cell in chosen if cell.model == model):
            path = arguments.work / f"{cell.name}.json"
            if not path.exists():
                target = _unplanted(cell, arguments.work, arguments.docs) if cell.arm == "target" else None
                write_json(path, _measure(cell, source.unet, data, held, target))
                row = read_json(path)
                print(*vars(cell).values(), f"{row['pooled_db']:.1f} {row['median_db']:.1f}", flush=True)
    _write(arguments.work, arguments.docs)


def _unplanted(cell: Cell, work: Path, docs: Path) -> float:
    """Median SQNR of the network without outliers, dB."""
    wanted = Cell(cell.model, "none", 1, cell.preset, "equalised")
    row = _rows(work, docs / PAGE).get(astuple(wanted))
    if row is None:
        raise SystemExit(f"the target of {cell.name} is the figure of {wanted.name}: measure that first")
    return float(row["median_db"])


def _measure(
    cell: Cell, original: Any, data: CalibrationSet, held: CalibrationSet, target: float | None
) -> dict[str, Any]:
    unet = copy.deepcopy(original)
    args, kwargs = held.gather(torch.arange(32))
    plant(unet, cell.planted, cell.ratio, args, kwargs)
    with torch.no_grad():
        expected, planted = original(*args, **kwargs).sample, unet(*args, **kwargs).sample
    config = qdiff_fx.QDiffConfig.preset(cell.preset, **(PLAIN if cell.arm == "plain" else {}))
    prepared = qdiff_fx.prepare(unet, config.replace(target_sqnr=target))
    report = qdiff_fx.calibrate(prepared, data, holdout=held, progress=False)
    worst = []
    if cell.planted == CONSTANT and cell.arm == "plain":
        ranking = qdiff_fx.sensitivity(prepared, data, samples=32, progress=False)
        worst = [row.name for row in ranking.worst("input", 3)]
    return {
        **vars(cell),
        "full_precision_change": float((planted - expected).abs().max() / expected.abs().max()),
        "pooled_db": report.quality["pooled_db"],
        "median_db": report.quality["median_db"],
        "accepted": report.quality["accepted"],
        "target_db": target,
        "raises": [row for row in report.raises if row["reason"].startswith("target:")],
        "inputs_in_carrier": sorted(
            {name for row in report.raises if row["kind"] == "input" for name in row["layers"]}
        ),
        "most_sensitive_inputs": worst,
        **origin(seed=config.seed),
    }


def _rows(work: Path, kept: Path) -> Mapping[Hashable, Row]:
    files = [work / f"{cell.name}.json" for model in MODELS for cell in cells(model)]
    return gathered(map(read_json, filter(Path.exists, files)), kept, itemgetter(*Cell.__dataclass_fields__))


def _write(work: Path, docs: Path) -> None:
    kept = docs / PAGE
    found = list(_rows(work, kept).values())
    write_json(kept, {"cells": found})
    lines = [
        "# Planted channel outliers on the bundled models",
        "",
        "Written by `benchmarks/outliers.py`. The planted networks compute the same function in full precision",
        "(change: largest difference over largest output). Equalised: the preset's defaults (channel factors,",
        "attention factors, allocation); plain: without factors and slacks. Rounded to nearest; output SQNR pooled /",
        f"median over timesteps, dB, 160 calibration rows, 160 held-out rows, seed 0; commits {commits(found)};",
        f"{machines(found)}.",
    ]
    for model in dict.fromkeys(row["model"] for row in found):
        rows = [row for row in found if row["model"] == model]
        lines += [
            "",
            f"## {model}",
            "",
            *_table(rows),
            "",
            *_ruined(rows),
            *_constants([row for row in rows if row["planted"] == CONSTANT]),
        ]
    write_bytes(docs / "results-outliers.md", ("\n".join(lines) + "\n").encode())


def _table(rows: list[Row]) -> list[str]:
    by_cell = {(row["planted"], row["ratio"], row["preset"], row["arm"]): row for row in rows}
    lines = [
        "| planted | ratio | change | W8A8 equalised | W8A8 plain | W4A8 equalised | W4A8 plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, ratio in sorted({(row["planted"], row["ratio"]) for row in rows}, key=_order):
        found = [
            by_cell.get((name, ratio, preset, arm)) for preset in ("w8a8", "w4a8") for arm in ("equalised", "plain")
        ]
        change = max(row["full_precision_change"] for row in found if row is not None)
        shown = [f"{row['pooled_db']:.1f} / {row['median_db']:.1f}" if row else "–" for row in found]
        lines.append(f"| {name} | {ratio} | {change:.0e} | {' | '.join(shown)} |")
    return lines


def _ruined(rows: list[Row]) -> list[str]:
    """Which plants ruin plain W8A8 at their largest ratio, by the pooled figure, and which do not."""
    planted = [row for row in rows if row["arm"] == "plain" and row["preset"] == "w8a8" and row["planted"] != "none"]
    ruined = [row["planted"] for row in planted if row["pooled_db"] < RUINED_DB]
    spared = [row["planted"] for row in planted if row["planted"] not in ruined]
    return [
        f"Plain W8A8 is ruined (under {RUINED_DB:g} dB pooled) by: {', '.join(ruined) or 'none'}; "
        f"not by: {', '.join(spared) or 'none'}."
    ]


def _order(entry: tuple[str, int]) -> tuple[int, int]:
    return (["none", *PLANTED, CONSTANT].index(entry[0]), entry[1])


def _constants(rows: list[Row]) -> list[str]:
    """What is said of the network whose outliers no factor can undo."""
    by_arm = {row["arm"]: row for row in rows}
    lines: list[str] = []
    if "plain" in by_arm:
        names = ", ".join(f"`{name}`" for name in by_arm["plain"]["most_sensitive_inputs"])
        lines += ["", f"The constant ({CONSTANT_RATIO} standard deviations): sensitivity names {names} first."]
    if "target" in by_arm:
        row = by_arm["target"]
        names = ", ".join(f"`{name}`" for name in row["inputs_in_carrier"][:_SHOWN])
        more = len(row["inputs_in_carrier"]) - _SHOWN
        names += f" and {more} more" if more > 0 else ""
        lines += [
            f"With `target_sqnr={row['target_db']:.1f}` W8A8 keeps {row['pooled_db']:.1f} / {row['median_db']:.1f} dB; "
            f"{len(row['raises'])} raises beyond the slacks; inputs in the carrier type: {names}."
        ]
    return lines


if __name__ == "__main__":
    main()
