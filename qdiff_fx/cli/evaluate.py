"""`qdiff-fx evaluate`: a quantized model against the full-precision one."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from qdiff_fx.cli import measurements
from qdiff_fx.cli.parser import OneLineParser, add_json_argument, output_folder, positive, verb_parser
from qdiff_fx.cli.plugins import loadable, named_loadable
from qdiff_fx.cli.sources import BUNDLED, add_source_arguments, open_source, require_full_precision
from qdiff_fx.errors import InputError
from qdiff_fx.evaluation import confident_share
from qdiff_fx.kernels.machine import describe_machine
from qdiff_fx.report.documents import network_entries, stored_bytes, table_row
from qdiff_fx.report.strips import save_samples
from qdiff_fx.report.tables import decibels, file_size, text_table
from qdiff_fx.safe_io import write_json


def parser() -> OneLineParser:
    """Arguments of this verb."""
    result = verb_parser(
        "evaluate",
        "Measure a quantized model: output SQNR on held-out (x_t, t), PSNR and SSIM of pictures from the same noise,\n"
        "sizes; on request Frechet distance and score, SQNR by layer and block, the sensitivity ranking.",
        "qdiff-fx evaluate fashion-uncond unet-w4a8 --samples 16 --seeds 3 --layers --frechet 2000 --out evaluation",
    )
    result.add_argument("model", metavar="MODEL", help="the full-precision model")
    result.add_argument("quantized", metavar="QUANTIZED", help="folder that qdiff-fx quantize wrote")
    result.add_argument("--samples", type=positive, default=16, help="trajectories (16)")
    result.add_argument("--steps", type=positive, default=50, help="sampling steps (50)")
    result.add_argument("--timesteps", type=positive, default=20, help="held-out timesteps among them (20)")
    result.add_argument("--seed", type=int, default=1, help="of the noise; another than the calibration's (1)")
    result.add_argument("--seeds", type=positive, default=1, metavar="N", help="noise seeds, for intervals (1)")
    result.add_argument("--layers", action="store_true", help="SQNR of every layer, attention and block")
    result.add_argument(
        "--sensitivity", action="store_true", help="what quantizing each layer, attention and block alone costs"
    )
    result.add_argument(
        "--frechet", type=positive, metavar="N", help="Frechet distance and score of N samples a seed, both networks"
    )
    result.add_argument(
        "--extractor",
        type=loadable,
        metavar="MODULE:NAME",
        help="a FeatureExtractor, or a function that gives one (the bundled models' classifier)",
    )
    result.add_argument(
        "--metric",
        type=named_loadable,
        action="append",
        default=[],
        metavar="NAME=MODULE:NAME",
        help="another picture metric, such as LPIPS: [B] figures from (reference, pictures) in [-1, 1]",
    )
    result.add_argument("--compile", action="store_true", help="compile both networks for the samples of --frechet")
    result.add_argument("--out", type=Path, metavar="DIR", help="write evaluation.json there; keeps finished samples")
    add_json_argument(result)
    result.add_argument("--backend", default="auto", help="kernels of the quantized model (auto)")
    add_source_arguments(result)
    return result


def run(arguments: Namespace) -> None:
    """Measure and print."""
    source = require_full_precision(open_source(arguments.model, context=arguments.context))
    quantized = open_source(arguments.quantized, context=arguments.context, backend=arguments.backend)
    if not quantized.quantized:
        raise InputError(f"{arguments.quantized}: is no quantized folder; name the --out of qdiff-fx quantize")
    for what, mine, other in (
        ("denoises", quantized.sample_shape, source.sample_shape),
        ("takes contexts of width", quantized.context_width, source.context_width),
    ):
        if mine != other:
            raise InputError(
                f"{arguments.quantized} {what} {mine}, {arguments.model} {other}: name the model that it was made from"
            )
    yardsticks = list(measurements.yardsticks(source, arguments))
    measured = [yardstick.measure(quantized.unet, arguments.quantized) for yardstick in yardsticks]
    yardstick, measurement = yardsticks[0], measured[0]
    classified = arguments.model in BUNDLED
    row = table_row("ours", arguments.quantized, "as stored", measurement, classified=classified)
    row["seconds_per_step"] = measurement.seconds_per_step
    full = 4 * sum(parameter.numel() for parameter in source.unet.parameters())
    stored = stored_bytes(quantized.folder)
    document: dict[str, Any] = {
        "kind": "evaluate",
        "model": {"name": source.name},
        "machine": describe_machine(),
        "settings": {
            "samples": arguments.samples,
            "steps": arguments.steps,
            "heldout_rows": yardstick.rows,
            "heldout_timesteps": len(yardstick.calls),
            "seed": arguments.seed,
        },
        "reference": {
            "confident_share": confident_share(yardstick.reference.images) if classified else None,
            "seconds_per_step": yardstick.seconds_per_step,
        },
        "table": [row],
        "sizes": {"fp32": full, "fp16": full // 2, "quantized": stored},
        **network_entries(quantized.unet),
    }
    document |= measurements.pictures(yardsticks, measured, dict(arguments.metric))
    document |= measurements.intervals(yardsticks, measured, document["picture_metrics"])
    if arguments.layers:
        document["parts"] = measurements.parts(source, quantized, yardsticks)
    if arguments.sensitivity:
        document["sensitivity"] = measurements.ranking(source, quantized, yardstick)
    if arguments.frechet is not None:
        document["distribution"] = measurements.distribution(source, quantized, arguments)
    if arguments.out is not None:
        images = {"full precision": yardstick.reference.images, arguments.quantized: measurement.images}
        document["samples"] = save_samples(output_folder(arguments.out), images)
        write_json(output_folder(arguments.out) / "evaluation.json", document)
    if arguments.json:
        print(json.dumps(document, indent=1))
        return
    rows = [
        ("output SQNR, pooled", f"{decibels(row['sqnr_pooled_db'])} dB"),
        ("output SQNR, median over timesteps", f"{decibels(row['sqnr_median_db'])} dB"),
        *(tuple(line) for line in document["picture_metrics"][0]["rows"]),
        ("weights", f"{file_size(stored)}, {stored / full:.3f} of fp32"),
    ]
    print(text_table(("yardstick", arguments.quantized), rows))
    for section in measurements.sections(document):
        print(f"\n{section}")
