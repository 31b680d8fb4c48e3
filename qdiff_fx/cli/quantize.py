"""`qdiff-fx quantize`: prepare, calibrate, convert, save."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import qdiff_fx
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.cli.collect import add_collect_arguments
from qdiff_fx.cli.parser import OneLineParser, verb_parser
from qdiff_fx.cli.sources import (
    Source,
    add_source_arguments,
    copy_sampling_files,
    open_source,
    require_full_precision,
)
from qdiff_fx.config import QDiffConfig
from qdiff_fx.report.documents import calibration_document, stored_bytes
from qdiff_fx.report.inspection import inspect_prepared
from qdiff_fx.report.tables import file_size
from qdiff_fx.safe_io import write_json


def parser() -> OneLineParser:
    """Arguments of this verb."""
    result = verb_parser(
        "quantize",
        "Turn a model into one with packed integer weights and save it; without --calibration, collect data first.",
        "qdiff-fx quantize fashion-uncond --preset w4a8 --out unet-w4a8 --calibration calibration",
    )
    result.add_argument("model", metavar="DIR", help="a diffusers folder, or fashion-uncond, fashion-cond")
    result.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the quantized model")
    result.add_argument("--preset", default="w4a8", help="w8a8, w4a8 (default), w8a32, w4a32, w4a6 or w4a4")
    result.add_argument("--calibration", type=Path, metavar="SET", help="folder that qdiff-fx collect wrote")
    add_collect_arguments(result)
    add_source_arguments(result)
    return result


def run(arguments: Namespace) -> None:
    """Quantize and save; say how large the result is."""
    config = QDiffConfig.preset(arguments.preset)
    source = require_full_precision(open_source(arguments.model, context=arguments.context))
    data = _data(source, arguments)
    prepared = qdiff_fx.prepare(source.unet, config)
    report = qdiff_fx.calibrate(prepared, data)
    inspection = inspect_prepared(prepared)
    quantized = qdiff_fx.convert(prepared, release=True)
    qdiff_fx.save(quantized, arguments.out)
    copy_sampling_files(source, arguments.out)
    stored = stored_bytes(arguments.out)
    document = calibration_document(source.name, arguments.preset, report, inspection, quantized, stored)
    write_json(arguments.out / "calibration.json", document)
    share = stored / document["sizes"]["fp32"]
    print(f"{arguments.out}: {arguments.preset.upper()}, {file_size(stored)}, {share:.3f} of fp32")


def _data(source: Source, arguments: Namespace) -> Any:
    if arguments.calibration is not None:
        return CalibrationSet.load(arguments.calibration)
    return source.collect(
        guidance_scale=arguments.guidance,
        num_inference_steps=arguments.steps,
        num_timesteps=arguments.timesteps,
        samples_per_timestep=arguments.samples,
        strategy=arguments.strategy,
        seed=arguments.seed,
    )
