"""`qdiff-fx demo`: everything on the bundled model, in minutes, with pictures."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline
from torch import Tensor

import qdiff_fx
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.channels import widest_channels
from qdiff_fx.cli.parser import OneLineParser, add_json_argument, output_folder, positive, verb_parser
from qdiff_fx.cli.sources import Source, copy_sampling_files, open_source
from qdiff_fx.evaluation import confident_share, endpoint_psnr
from qdiff_fx.evaluation.arms import ARMS, STUDY_PRESETS, Arm, pass_activations, widen_weights
from qdiff_fx.evaluation.study import Measurement, Yardstick
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.kernels.machine import describe_machine
from qdiff_fx.numerics.metrics import finite_or_none
from qdiff_fx.report import documents, plots
from qdiff_fx.report.block_graph import block_graph
from qdiff_fx.report.html import write_report
from qdiff_fx.report.inspection import Inspection, inspect_prepared
from qdiff_fx.report.pictures import LabelledRow, save_comparison
from qdiff_fx.report.strips import save_strips
from qdiff_fx.report.tables import ARM_HEADER, ARM_NUMERIC, arm_cells, decibels, file_size, text_table
from qdiff_fx.safe_io import write_json

MODEL = "fashion-uncond"
CALIBRATION_SEED, EVALUATION_SEED = 0, 1
PRESETS = ("w8a8", "w4a8")
"""What is converted, saved, loaded and sampled from."""

SHOWN = 10
"""Samples of each network in the picture; they are the first of the measured ones."""

_HELDOUT_TIMESTEPS = 13


def parser() -> OneLineParser:
    """Arguments of this verb."""
    result = verb_parser(
        "demo",
        "Quantize the bundled model to W4A8 and W8A8, sample with the integer models through an unmodified diffusers\n"
        "pipeline, measure them against full precision and against simpler ways, and write report.html.",
        "qdiff-fx demo --out demo",
    )
    result.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder of the results (demo)")
    result.add_argument("--steps", type=positive, default=50, help="sampling steps (50)")
    result.add_argument("--samples", type=positive, default=16, help="trajectories that are measured (16)")
    result.add_argument("--calibration-samples", type=positive, default=32, metavar="N", help="inputs a timestep (32)")
    result.add_argument("--calibration-timesteps", type=positive, default=10, metavar="N", help="timesteps (10)")
    add_json_argument(result)
    return result


@dataclass(kw_only=True)
class Demo:
    """What the stages hand on to each other."""

    source: Source
    folder: Path
    steps: int
    samples: int
    quiet: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    rows: list[LabelledRow] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and say that it is done unless the caller wants JSON alone."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started
        self.say(f"  {name:<46}{self.seconds[name]:6.1f} s")

    def say(self, line: str) -> None:
        """Print a line at once, unless the caller wants JSON alone."""
        if not self.quiet:
            print(line, flush=True)

    @property
    def noise(self) -> Tensor:
        """[samples, C, H, W], where every measured trajectory starts."""
        return self.source.noise(self.samples, EVALUATION_SEED)

    def add(self, arm: str, title: str, preset: str, measurement: Measurement) -> None:
        """A row of the table."""
        self.table.append(documents.table_row(arm, title, preset, measurement, classified=True))


def run(arguments: Namespace) -> None:
    """Run all stages, write all files, print the table."""
    started = time.monotonic()
    folder = output_folder(arguments.out)
    demo = Demo(
        source=open_source(MODEL),
        folder=folder,
        steps=arguments.steps,
        samples=arguments.samples,
        quiet=arguments.json,
    )
    demo.say(f"qdiff-fx demo: {MODEL}, DDIM-{demo.steps}, results in {folder}/")
    with demo.stage("collect calibration data"):
        data = demo.source.collect(
            guidance_scale=1.0,
            num_inference_steps=demo.steps,
            num_timesteps=min(arguments.calibration_timesteps, demo.steps),
            samples_per_timestep=arguments.calibration_samples,
            seed=CALIBRATION_SEED,
        )
    with demo.stage("full-precision trajectories"):
        sampler = demo.source.sampler(demo.noise, steps=demo.steps, guidance_scale=1.0, keep_steps=True)
        yardstick = Yardstick(demo.source.unet, sampler, num_timesteps=_HELDOUT_TIMESTEPS, num_calls=demo.steps)
    _show(demo, "FP32", "full precision", demo.source.unet)
    for arm in ARMS:
        quantizers = _measure_arm(demo, arm, data, yardstick)  # of the last arm: split, one grid a tensor
    parts = [_quantize(demo, preset, data, yardstick) for preset in PRESETS]
    demo.rows.sort(key=lambda row: _ROW_ORDER.index(row.title))
    with demo.stage("pictures and plots"):
        shown = next(part for preset, part in zip(PRESETS, parts, strict=True) if preset == "w4a8")
        ranges = documents.most_varying(quantizers, 6)
        pictures = _draw(demo, shown, ranges)
    document = _document(demo, yardstick, data, shown) | {"pictures": pictures, "ranges": ranges}
    document["total_seconds"] = time.monotonic() - started
    write_json(folder / "demo.json", document)
    report = write_report(folder)
    if arguments.json:
        print(json.dumps(document | {"report": str(report)}, indent=1))
        return
    print()
    print(text_table(ARM_HEADER, [arm_cells(row) for row in demo.table], numeric=ARM_NUMERIC))
    print()
    full = demo.sizes["fp32"]
    print("  ".join(f"{name.upper()} {file_size(count)} ({count / full:.3f})" for name, count in demo.sizes.items()))
    print(f"open {report}; all figures are in {folder / 'demo.json'}")
    print(f"done in {time.monotonic() - started:.0f} s")


_ROW_ORDER = ("FP32", "RTN W4A8", "qdiff W4A8", "qdiff W8A8")


def _measure_arm(demo: Demo, arm: Arm, data: CalibrationSet, yardstick: Yardstick) -> tuple[dict[str, Any], ...]:
    """Measure all presets of one arm, simulated; they share one calibration, whose quantizers are returned."""
    with demo.stage(f"{arm.title.partition(':')[0]}: W4A8, W4A32, W8A8"):
        measured: dict[str, Measurement] = {}
        prepared = qdiff_fx.prepare(demo.source.unet, arm.config("w4a8"))
        report = qdiff_fx.calibrate(prepared, data)
        measured["w4a8"] = yardstick.measure(prepared, f"{arm.name} w4a8")
        if arm.name == "rtn":
            psnr = decibels(measured["w4a8"].psnr.median_db)
            _show(demo, "RTN W4A8", f"rounded to nearest, no split\n{psnr} dB end-point PSNR", prepared)
        pass_activations(prepared)
        measured["w4a32"] = yardstick.measure(prepared, f"{arm.name} w4a32")
        prepared.set_mode(QuantizerMode.QUANTIZE)
        widen_weights(prepared, 8)
        measured["w8a8"] = yardstick.measure(prepared, f"{arm.name} w8a8")
        for preset in STUDY_PRESETS:
            demo.add(arm.name, arm.title, preset, measured[preset])
    return report.quantizers


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What reports show of one converted model."""

    inspection: Inspection
    layers: list[dict[str, Any]]
    graph: dict[str, Any]
    raises: list[dict[str, Any]]
    channels: list[dict[str, Any]]
    backend: str
    integer_sqnr_db: float


def _quantize(demo: Demo, preset: str, data: CalibrationSet, yardstick: Yardstick) -> Converted:
    """The main job: prepare, calibrate, convert, save, load, sample, measure."""
    name = preset.upper()
    folder = demo.folder / f"unet-{preset}"
    with demo.stage(f"{name}: prepare and calibrate"):
        prepared = qdiff_fx.prepare(demo.source.unet, qdiff_fx.QDiffConfig.preset(preset))
        report = qdiff_fx.calibrate(prepared, data)
        inspection = inspect_prepared(prepared)
    with demo.stage(f"{name}: convert, save, load"):
        qdiff_fx.save(qdiff_fx.convert(prepared), folder)
        demo.sizes |= documents.full_precision_sizes(inspection) | {preset: documents.stored_bytes(folder)}
        copy_sampling_files(demo.source, folder)
        quantized = qdiff_fx.load(folder)
    with demo.stage(f"{name}: measure on backend {quantized.backend}"):
        # The reference backend is exact and slow: there the simulation is measured, and the integers are checked once.
        simulated = quantized.backend == "reference"
        measurement = yardstick.measure(prepared if simulated else quantized, f"ours {preset}")
        demo.add(
            "ours", f"ours: the preset's defaults, {'simulated' if simulated else 'on integers'}", preset, measurement
        )
        if not simulated:
            demo.table[-1]["seconds_per_step"] = measurement.seconds_per_step
        integer_sqnr = yardstick.output_sqnr(quantized, f"integer {preset}") if simulated else measurement.sqnr
    with demo.stage(f"{name}: pictures from DDIMPipeline"):
        psnr = decibels(measurement.psnr.median_db)
        _show(demo, f"qdiff {name}", f"integer model from disk\n{psnr} dB end-point PSNR", quantized)
    return Converted(
        inspection=inspection,
        layers=documents.layer_rows(inspection, quantized.lowering_report(), report.sensitivity),
        graph=block_graph(quantized.plan),
        raises=list(report.raises),
        channels=widest_channels(report.factors),
        backend=quantized.backend,
        integer_sqnr_db=integer_sqnr.pooled_db,
    )


def _show(demo: Demo, title: str, detail: str, unet: Any) -> None:
    """Sample the picture's row with an unmodified diffusers pipeline, from the noise of the measured trajectories."""
    build: Any = DDIMPipeline  # diffusers pipelines carry no types
    pipeline = build(unet=unet, scheduler=demo.source.require_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    images = pipeline(
        batch_size=min(SHOWN, demo.samples), generator=generator, num_inference_steps=demo.steps, output_type="np"
    ).images
    demo.rows.append(LabelledRow(title=title, detail=detail, images=torch.from_numpy(images).permute(0, 3, 1, 2)))


def _draw(demo: Demo, shown: Converted, ranges: list[dict[str, Any]]) -> dict[str, str]:
    """Write every picture; names in the report with their files."""
    files = {
        "samples": "samples.png",
        "error_growth": "error-growth.png",
        "sqnr_by_timestep": "sqnr-by-timestep.png",
        "activation_ranges": "activation-ranges.png",
        "shortcut_ranges": "shortcut-ranges.png",
    }
    save_comparison(demo.folder / files["samples"], demo.rows)
    curves = [
        {
            "label": f"{_CURVE_NAMES[row['arm']]} {row['preset'].upper()}",
            "colour": row["arm"],
            "dashed": row["preset"] == "w8a8",
            "errors": row["error_by_step"],
            "sqnr": row["sqnr_by_timestep"],
        }
        for row in demo.table
        if row["preset"] in PRESETS and row["arm"] in _CURVE_NAMES
    ]
    curves.sort(key=lambda curve: -curve["errors"][-1])
    plots.plot_error_growth(demo.folder / files["error_growth"], curves)
    plots.plot_sqnr_by_timestep(demo.folder / files["sqnr_by_timestep"], curves)
    plots.plot_activation_ranges(demo.folder / files["activation_ranges"], ranges)
    plots.plot_shortcut_ranges(demo.folder / files["shortcut_ranges"], shown.inspection.to_dict()["shortcuts"])
    return files


_CURVE_NAMES = {"rtn": "round to nearest", "mse": "MSE ranges, no split", "ours": "ours"}
"""Arms in the plots; all of them would lie on top of each other."""


def _document(demo: Demo, yardstick: Yardstick, data: CalibrationSet, shown: Converted) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in demo.source.unet.parameters())
    return {
        "kind": "demo",
        "model": {"name": MODEL, "preset": "w4a8", "parameters": parameters, "layers": len(shown.inspection.layers)},
        "machine": describe_machine(),
        "settings": {
            "steps": demo.steps,
            "samples": demo.samples,
            "heldout_rows": yardstick.rows,
            "heldout_timesteps": len(yardstick.calls),
            "calibration_rows": len(data),
            "calibration_timesteps": len(data.timesteps),
            "calibration_seed": CALIBRATION_SEED,
            "evaluation_seed": EVALUATION_SEED,
            "backend": shown.backend,
        },
        "reference": {
            "confident_share": confident_share(yardstick.reference.images),
            "seconds_per_step": yardstick.seconds_per_step,
        },
        "table": demo.table,
        "sizes": demo.sizes,
        "integer_sqnr_pooled_db": shown.integer_sqnr_db,
        "shown_psnr_db": {
            row.title: finite_or_none(endpoint_psnr(demo.rows[0].images * 2 - 1, row.images * 2 - 1).median_db)
            for row in demo.rows[1:]
        },
        "shortcuts": shown.inspection.to_dict()["shortcuts"],
        "samples": save_strips(demo.folder, demo.rows),
        "layers": shown.layers,
        "graph": shown.graph,
        "raises": shown.raises,
        "channels": shown.channels,
        "seconds": demo.seconds,
    }
