"""What a few more bytes and multiplications buy: the slacks of bit allocation, by the estimate and by exact ranking.

    python benchmarks/allocation.py --work /tmp/allocation
    python benchmarks/allocation.py --work /tmp/allocation --rounding learned --ranking estimate

Writes docs/results-allocation.json, .md and a plot. Finished rows are kept in the work folder: a killed run continues.
Slacks that raise the same quantizers are measured once.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import qdiff_fx
from cells import gathered
from provenance import commits, machines, origin
from qdiff_fx.allocation.allocate import allocate
from qdiff_fx.allocation.estimate import ErrorEstimate, estimate_errors
from qdiff_fx.allocation.units import input_units, total_multiplications, weight_units
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.cli.sources import open_source
from qdiff_fx.evaluation.study import Yardstick
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.identity import digest
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.prepare.raises import ApplyRaises, Raise
from qdiff_fx.reconstruction import ReconstructionConfig
from qdiff_fx.report.plots import plot_slacks
from qdiff_fx.safe_io import read_json, write_bytes, write_json
from qdiff_fx.stages import correct_biases, layer_input_means, learn_blocks
from qdiff_fx.stages.biases import Means, set_corrections
from qdiff_fx.stages.fit import split_selection

STEPS, IMAGES, SEED = 50, 16, 0
WEIGHT_SLACKS = (0.0, 0.01, 0.02, 0.04, 0.06, 0.10, 0.20)
ACTIVATION_SLACKS = (0.0, 0.005, 0.01, 0.02, 0.05)
ROUNDINGS = ("nearest", "learned")
RANKINGS = ("estimate", "exact")
DEFAULTS = {"weight_slack": 0.06, "activation_slack": 0.02}
MODELS = {"fashion-uncond": 1.0, "fashion-cond": 3.0}
"""Bundled models with their guidance scale."""

_ORDER = ("ranking", "kind", "slack")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of finished rows")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounding", nargs="*", default=list(ROUNDINGS), choices=ROUNDINGS)
    parser.add_argument("--ranking", nargs="*", default=list(RANKINGS), choices=RANKINGS)
    arguments = parser.parse_args()
    for model in arguments.models:
        _measure(model, arguments.work, arguments.docs, arguments.rounding, arguments.ranking)
    _write(arguments.work, arguments.docs)


def _measure(model: str, work: Path, docs: Path, roundings: Sequence[str], rankings: Sequence[str]) -> None:
    """Measure the rows that the work folder lacks; each goes onto the page."""
    source, guidance = open_source(model), MODELS[model]
    data = source.collect(
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        num_timesteps=20,
        samples_per_timestep=32,
        seed=SEED,
        path=work / model / "calibration",
        progress=False,
    )
    prepared = qdiff_fx.prepare(
        source.unet, qdiff_fx.QDiffConfig.preset("w4a8", weight_slack=0.0, activation_slack=0.0)
    )
    qdiff_fx.calibrate(prepared, data, progress=False)
    means = layer_input_means(prepared, data, progress=False)
    errors = {"estimate": estimate_errors(prepared.graph_module, prepared.signature, data, means=means, seed=SEED)}
    if "exact" in rankings:
        report = qdiff_fx.sensitivity(prepared, data, checkpoint_dir=work / model / "sensitivity", progress=False)
        write_json(work / model / "correlation.json", report.rank_correlation)
        errors["exact"] = _exact(prepared, errors["estimate"], report)
    sampler = source.sampler(source.noise(IMAGES, SEED + 1), steps=STEPS, guidance_scale=guidance, keep_steps=True)
    yardstick = Yardstick(source.unet, sampler, num_timesteps=13, progress=False)
    runs = [
        (rounding, ranking, kind, slack)
        for rounding in roundings
        for ranking in rankings
        for kind, slacks in (("weight", WEIGHT_SLACKS), ("activation", ACTIVATION_SLACKS))
        for slack in slacks
    ]
    for rounding, ranking, kind, slack in runs:
        path = work / model / f"row-{rounding}-{ranking}-{kind}-{slack:g}.json"
        if not path.exists():
            slacks = DEFAULTS | {f"{kind}_slack": slack}
            raises = allocate(prepared.graph_module, errors[ranking], **slacks)
            key = digest(f"{rounding} {sorted((item.target, str(item.bits)) for item in raises)}")
            row = _known(work / model, key) or _row(
                prepared, raises, means, yardstick, data if rounding == "learned" else None
            )
            labels = {"model": model, "rounding": rounding, "ranking": ranking, "kind": kind, "slack": slack}
            write_json(path, row | labels | {"key": key} | origin(SEED))
            print(*labels.values(), f"{row['median_db']:.1f} {row['endpoint_db']:.1f}", flush=True)
            _write(work, docs)


def _known(folder: Path, key: str) -> dict[str, Any] | None:
    """What was measured of a network with the same raises."""
    rows = (read_json(path) for path in folder.glob("row-*.json"))
    return next((row for row in rows if row["key"] == key), None)


def _row(
    prepared: Any, raises: Sequence[Raise], means: Means, yardstick: Yardstick, data: CalibrationSet | None
) -> dict[str, Any]:
    """Both yardsticks of `prepared` with these raises, its rounding learned on `data` where it is given."""
    model = copy.deepcopy(prepared)
    inputs = {unit.target: unit for unit in input_units(model.graph_module)}
    ApplyRaises(tuple(raises)).run(
        model.graph_module, PassContext(config=model.qdiff_config, signature=model.signature)
    )
    if data is not None:
        set_corrections(model, {})
        fit, selection = split_selection(data, SEED)
        learn_blocks(model, fit, selection, ReconstructionConfig.preset("fast"), 32, None, False)
    correct_biases(model, means)
    model.set_mode(QuantizerMode.QUANTIZE)
    measured = yardstick.measure(model, "allocation")
    kept = sum(inputs[item.target].multiplications for item in raises if item.kind == "input")
    return {
        "pooled_db": measured.sqnr.pooled_db,
        "median_db": measured.sqnr.median_db,
        "endpoint_db": measured.psnr.median_db,
        "bytes": sum(unit.bytes for unit in weight_units(model.graph_module)),
        "carrier_share": kept / total_multiplications(model.graph_module),
        "raised": len(raises),
    }


def _exact(prepared: Any, estimate: ErrorEstimate, report: Any) -> ErrorEstimate:
    """The estimate with the present widths' errors replaced by measured ones."""
    measured = {(row.kind, row.name): row.error for row in report.rows}
    weights = {
        unit.target: dict(estimate.weights[unit.target]) | {unit.quantizer.spec.bits: measured["weight", unit.name]}
        for unit in weight_units(prepared.graph_module)
    }
    inputs = {unit.target: measured["input", unit.name] for unit in input_units(prepared.graph_module)}
    return ErrorEstimate(weights=weights, inputs=inputs)


def _write(work: Path, docs: Path) -> None:
    kept = docs / "results-allocation.json"
    found = gathered(map(read_json, work.glob("*/row-*.json")), kept, itemgetter("model", "rounding", *_ORDER))
    rows = sorted(
        found.values(), key=lambda row: (row["model"], row["rounding"] != "nearest", *(row[name] for name in _ORDER))
    )
    correlations = read_json(kept)["rank_correlation"] if kept.exists() else {}
    correlations |= {path.parent.name: read_json(path) for path in sorted(work.glob("*/correlation.json"))}
    write_json(kept, {"rank_correlation": correlations, "cells": rows})
    plot_slacks(docs / "images" / "allocation.png", rows)
    lines = [
        "# Bit allocation on the bundled models",
        "",
        "Written by `benchmarks/allocation.py`: W4A8 with channel factors, 640 calibration rows, one seed; rounded to",
        f'nearest, or rounding and steps learned (preset "fast"). End point: DDIM-{STEPS}, {IMAGES} samples from the',
        "same noise, median. While one slack varies, the other has its default (weights",
        f"{DEFAULTS['weight_slack']:.0%}, activations {DEFAULTS['activation_slack']:.0%}). The exact ranking measures",
        f"every layer alone at its own width; errors at 8 bits are the estimate's in both. Commits {commits(rows)};",
        f"{machines(rows)}.",
        "",
        "![slacks](images/allocation.png)",
        "",
        *(
            f"Rank correlation (Spearman) of the estimate with the exact ranking, {model}: "
            + ", ".join(f"{kind}s {value:.2f}" for kind, value in correlation.items())
            + ".\n"
            for model, correlation in correlations.items()
        ),
        "| model | rounding | ranking | slack | pooled, dB | median, dB | end point, dB | weight bytes | carrier |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
    ]
    write_bytes(docs / "results-allocation.md", ("\n".join(lines) + "\n").encode())


def _line(row: dict[str, Any]) -> str:
    cells: Sequence[str] = (
        row["model"],
        row["rounding"],
        row["ranking"],
        f"{row['kind']} {row['slack']:.1%}",
        *(f"{row[name]:.1f}" for name in ("pooled_db", "median_db", "endpoint_db")),
        f"{row['bytes']:,}",
        f"{row['carrier_share']:.2%}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
