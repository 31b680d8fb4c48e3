"""docs/results-reconstruction.md and .json from the finished cells of benchmarks/quality.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from provenance import commits, machines
from qdiff_fx.reconstruction.config import PRESETS
from qdiff_fx.report.plots import COLOURS, plot_error_growth
from qdiff_fx.safe_io import write_bytes, write_json

PLOT = "images/reconstruction-error-growth-{model}.png"
CHAIN = ("RTN min-max", "RTN MSE", "split", "bias correction", "layer AdaRound", "block AdaRound", "LSQ")
TOLERATED_LOSS_DB = 0.1
YARDSTICKS = {"pooled_db": "pooled", "median_db": "median", "endpoint_db": "end point"}


def write_page(docs: Path, cells: Mapping[str, dict[str, dict[str, Any]]]) -> None:
    """Write page, JSON and plots.

    Args:
      docs: the folder of the page.
      cells: the rows that are there, by model and name.
    """
    cells = {model: rows for model, rows in cells.items() if rows}
    if not cells:
        return
    write_json(
        docs / "results-reconstruction.json", {"cells": [row for rows in cells.values() for row in rows.values()]}
    )
    sections = [_head([row for rows in cells.values() for row in _parted(rows)[1].values()])]
    for model, rows in cells.items():
        sections += [f"## {model}", *_sections(docs, model, rows)]
    write_bytes(docs / "results-reconstruction.md", "\n\n".join(filter(None, sections)).encode() + b"\n")


def _sections(docs: Path, model: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    blocks, cells = _parted(rows)
    growth = next((row["growth"] for row in cells.values() if row["growth"]), None)
    return [
        _table("The chain", [name for name in cells if name[:2] in ("W4", "W8")], cells),
        _steps(cells),
        _many_images(cells),
        _seeds(cells),
        _growth(docs, model, growth) if growth else "",
        _presets(cells),
        _blocks(blocks),
    ]


def _presets(cells: dict[str, dict[str, Any]]) -> str:
    names = [name for name in cells if name.startswith("preset")]
    return _table("Presets", [*names, "W4A32/block AdaRound"], cells) if names else ""


def _parted(cells: dict[str, dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """(cells of one block, cells of the network)."""
    blocks = {name: row for name, row in cells.items() if "presets" in row}
    return blocks, {name: row for name, row in cells.items() if name not in blocks}


def _blocks(blocks: dict[str, dict[str, Any]]) -> str:
    if not blocks:
        return ""
    lines = [
        "### Presets on single blocks",
        "",
        "Reconstruction loss over all calibration rows as a share of rounding to nearest; seconds in brackets.",
        "",
        f"| block | {' | '.join(PRESETS)} |",
        f"|---|{'---|' * len(PRESETS)}",
    ]
    for name, row in blocks.items():
        shares = [
            f"{result['learned_loss'] / result['initial_loss']:.3f} ({result['seconds']:.0f} s)"
            for result in (row["presets"][preset] for preset in PRESETS)
        ]
        lines.append(f"| {name.partition('/')[2]} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _head(rows: list[dict[str, Any]]) -> str:
    some = rows[0]
    return f"""# Reconstruction on the bundled models

Written by `benchmarks/quality.py`; the command, commit and seed of every cell are in `results-reconstruction.json`
(commits {commits(rows)}; {machines(rows)},
beside other work). Uniform bits but for the boundary rule: no allocation, no channel factors.
{some["calibration_rows"]} calibration rows, {some["heldout_rows"]} held-out rows of other trajectories. Output SQNR is
pooled, and the median over timesteps; end point: PSNR after DDIM-50, 16 samples from the same noise, median. Four-bit
rounding is learned once, with activations in full precision, and reused at every activation width, by preset "fast" as
it was at the cell's commit (decisions/021). Every row includes what the rows before it in the chain do, but that
learned rounding does without corrected biases, since a block's loss sees the means. RTN rows and SQuant have nothing
learned, RTN rows have no shortcut split. Seconds are wall time, halts for other work included."""


def _table(title: str, names: list[str], cells: dict[str, dict[str, Any]]) -> str:
    rows = [cells[name] for name in dict.fromkeys(names) if name in cells]
    if not rows:
        return ""
    lines = [
        f"### {title}",
        "",
        "| cell | output SQNR pooled, dB | median, dB | end-point PSNR, dB | seconds of learning |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['cell']} | {row['pooled_db']:.2f} | {row['median_db']:.2f} | {row['endpoint_db']:.2f} | "
        f"{row['learning_seconds']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _steps(cells: dict[str, dict[str, Any]]) -> str:
    """Steps of the chain that lose, by any yardstick; end points also sample by sample, with a standard error."""
    losses = []
    for width in dict.fromkeys(name.split("/")[0] for name in cells if name[:2] in ("W4", "W8")):
        present = [step for step in CHAIN if f"{width}/{step}" in cells]
        for before, after in itertools.pairwise(present):
            old, new = cells[f"{width}/{before}"], cells[f"{width}/{after}"]
            for key, label in YARDSTICKS.items():
                if new[key] < old[key] - TOLERATED_LOSS_DB:
                    paired = "–" if key != "endpoint_db" else "{:+.2f} ± {:.2f}".format(*_paired(old, new))
                    losses.append(
                        f"| {width} | {before} -> {after} | {label} | {new[key] - old[key]:+.2f} | {paired} |"
                    )
    head = f"### Steps of the chain that lose more than {TOLERATED_LOSS_DB} dB\n\n"
    if not losses:
        return head + "None."
    head += "An end point is a median over samples; their mean difference has a standard error.\n\n"
    titles = "| width | step | yardstick | change, dB | mean difference by sample, dB |"
    return head + "\n".join([titles, "|---|---|---|---|---|", *losses])


def _paired(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, float]:
    """Mean difference of the end points sample by sample, dB, and its standard error."""
    old, new = (torch.tensor(row["endpoint_by_sample"]) for row in (before, after))
    return float((new - old).mean()), float((new - old).std() / len(old) ** 0.5)


def _many_images(cells: dict[str, dict[str, Any]]) -> str:
    """Steps of the chain by many more end points, whose differences by sample have a standard error."""
    by_count: dict[str, list[dict[str, Any]]] = {}
    for name, row in cells.items():
        count, _, rest = name.partition(" images/")
        if rest:
            by_count.setdefault(f"{count} images, {rest.split()[0]}", []).append(row)
    lines = []
    for label, rows in by_count.items():
        for before, after in itertools.pairwise(rows):
            old, new = (mean(row["endpoint_by_sample"]) for row in (before, after))
            change, error = _paired(before, after)
            step = f"{_step_name(before)} -> {_step_name(after)}"
            lines.append(f"| {label} | {step} | {old:.2f} | {new:.2f} | {change:+.2f} ± {error:.2f} |")
    if not lines:
        return ""
    head = "### More end points\n\nMean over samples, and the mean difference with its standard error.\n\n"
    return head + "\n".join(["| cells | step | before, dB | after, dB | change, dB |", "|---|---|---|---|---|", *lines])


def _step_name(row: dict[str, Any]) -> str:
    return str(row["cell"]).partition("/")[2].partition(" ")[2]


def _seeds(cells: dict[str, dict[str, Any]]) -> str:
    rows = [row for name, row in cells.items() if name == "W4A8/LSQ" or (name[:4] == "seed" and "LSQ" in name)]
    if len(rows) < 2:
        return ""
    figures = []
    for key, label in YARDSTICKS.items():
        values = [row[key] for row in rows]
        spread = math.sqrt(sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))
        figures.append(f"{label} {mean(values):.2f} ± {spread:.2f}")
    table = _table(f"Final W4A8, {len(rows)} seeds", [row["cell"] for row in rows], cells)
    return f"{table}\n\nMean and standard deviation, dB: {', '.join(figures)}."


def _growth(docs: Path, model: str, growth: dict[str, list[float]]) -> str:
    plot = PLOT.format(model=model)
    colours = dict(zip(growth, COLOURS, strict=False))
    curves = [{"label": label, "colour": colours[label], "errors": errors} for label, errors in growth.items()]
    plot_error_growth(docs / plot, curves)
    count = len(next(iter(growth.values())))
    places = [count // 10 - 1, count // 2 - 1, count * 9 // 10 - 1, count - 1]
    lines = [
        f"### Growth of the error over DDIM-{count}, final W4A8",
        "",
        f"![error growth]({plot})",
        "",
        "Relative error of the sample against full precision from the same noise, after so many steps:",
        "",
        f"| | {' | '.join(str(place + 1) for place in places)} |",
        f"|---|{'---|' * len(places)}",
    ]
    lines += [
        f"| {label} | {' | '.join(f'{errors[place]:.4f}' for place in places)} |" for label, errors in growth.items()
    ]
    return "\n".join(lines)
