"""`qdiff-fx inspect`: what a model consists of."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import qdiff_fx
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.channels import channel_cells
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.calibration.report import quality_line
from qdiff_fx.cli.parser import OneLineParser, add_json_argument, verb_parser
from qdiff_fx.cli.sources import Source, add_source_arguments, open_source
from qdiff_fx.config import CARRIER_BITS, QDiffConfig
from qdiff_fx.evaluation.inference import evaluating
from qdiff_fx.model import QuantizedUNet
from qdiff_fx.report.inspection import Inspection, inspect_prepared
from qdiff_fx.report.tables import file_size, text_table

_STEPS, _TIMESTEPS, _SAMPLES = 20, 5, 4
"""Of the trajectories that give the ranges: a few forward passes."""

_WORST, _NAMED = 5, 3
"""Rows of channel ranges, and operands named a reason: the JSON document holds the rest."""

_CHANNELS = ("input of", "widest channel", "after", "factor", "error, dB")


def parser() -> OneLineParser:
    """Arguments of this verb."""
    result = verb_parser(
        "inspect",
        "Show what would be quantized: shortcuts with the range ratio of their parts, attentions, layers, "
        "reconstruction blocks,\nparameters and bytes by bit width. A quantized folder shows what runs where.",
        "qdiff-fx inspect fashion-uncond --preset w4a8",
    )
    result.add_argument("model", metavar="DIR", help="a diffusers folder, fashion-uncond, fashion-cond, or a quantized")
    result.add_argument("--preset", default="w4a8", help="w8a8, w4a8 (default), w8a32, w4a32, w4a6 or w4a4")
    result.add_argument("--calibration", type=Path, metavar="SET", help="take the ranges from this set's inputs")
    result.add_argument("--layers", action="store_true", help="also list every layer and block")
    add_json_argument(result)
    add_source_arguments(result)
    return result


def run(arguments: Namespace) -> None:
    """Print the inspection."""
    config = QDiffConfig.preset(arguments.preset)
    source = open_source(arguments.model, context=arguments.context)
    if source.quantized:
        _show_quantized(source.unet, as_json=arguments.json)
        return
    prepared = qdiff_fx.prepare(source.unet, config)
    data = _inputs(source, arguments)
    batches = list(data.batches(_SAMPLES))[: _TIMESTEPS * 2] if data is not None else []
    with evaluating(prepared), progress_bar("ranges", total=len(batches), progress=None) as bar:
        for batch in batches:
            prepared(*batch.args, **batch.kwargs)
            bar.update(1)
    inspection = inspect_prepared(prepared)
    if arguments.json:
        print(json.dumps(inspection.to_dict(), indent=1))
        return
    print(f"{source.name} at {arguments.preset.upper()}\n")
    print("\n\n".join(_sections(inspection, layers=arguments.layers)))
    if config.weight_slack > 0:
        raised = "raise 4-bit weights to 8 bits" if config.weight_bits <= 4 else "keep layers in the carrier type"
        print(f"\ncalibrate may {raised} for at most {config.weight_slack:.0%} more bytes")


def _inputs(source: Source, arguments: Namespace) -> CalibrationSet | None:
    if arguments.calibration is not None:
        return CalibrationSet.load(arguments.calibration)
    if source.scheduler is None or (source.is_conditional and source.context is None):
        return None
    return source.collect(
        guidance_scale=arguments.guidance,
        num_inference_steps=_STEPS,
        num_timesteps=_TIMESTEPS,
        samples_per_timestep=_SAMPLES,
    )


def _sections(inspection: Inspection, *, layers: bool) -> list[str]:
    shortcuts = [
        (
            row.layer,
            " + ".join(str(part.channels) for part in row.parts),
            "  ".join(f"[{part.minimum:.2f}, {part.maximum:.2f}]" for part in row.parts)
            if row.range_ratio is not None
            else "not observed",
            f"{row.range_ratio:.2f}" if row.range_ratio is not None else "–",
        )
        for row in inspection.shortcuts
    ]
    attentions = [(row.name, _bits(row.operand_bits), _bits(row.softmax_bits)) for row in inspection.attentions]
    sizes = [
        (
            _bits(None if row.bits == CARRIER_BITS else row.bits),
            f"{row.parameters:,}",
            file_size(row.bytes_before),
            file_size(row.bytes_after),
        )
        for row in inspection.sizes
    ]
    before = sum(row.bytes_before for row in inspection.sizes)
    after = sum(row.bytes_after for row in inspection.sizes)
    parameters = sum(row.parameters for row in inspection.sizes)
    sizes.append(("all", f"{parameters:,}", file_size(before), f"{file_size(after)}  ({after / before:.3f})"))
    operators: dict[str, int] = {}
    for layer in inspection.layers:
        operators[layer.operator] = operators.get(layer.operator, 0) + 1
    counts = ", ".join(f"{count} {name}" for name, count in operators.items())
    sections = [
        _section("shortcuts", ("layer", "channels", "ranges of the parts", "ratio"), shortcuts, numeric=(3,)),
        _section("attentions", ("attention", "q, k, v bits", "softmax bits"), attentions, numeric=(1, 2)),
        f"layers: {len(inspection.layers)} ({counts})",
        f"reconstruction blocks: {len(inspection.blocks)}",
        _section("weights", ("bits", "parameters", "before", "after"), sizes, numeric=(1, 2)),
    ]
    if layers:
        rows = [
            (row.name, _bits(row.weight_bits), _bits(row.activation_bits), f"{row.bytes_after:,}", row.reason)
            for row in inspection.layers
        ]
        blocks = [(str(row.index), row.name, str(len(row.layers))) for row in inspection.blocks]
        sections[2] = _section("layers", ("layer", "W bits", "A bits", "bytes", "why"), rows, numeric=(1, 2, 3))
        sections[3] = _section("reconstruction blocks", ("#", "block", "layers"), blocks, numeric=(0, 2))
    return sections


def _section(title: str, header: tuple[str, ...], rows: list[Any], *, numeric: tuple[int, ...]) -> str:
    if not rows:
        return f"{title}: none"
    return f"{title}: {len(rows)}\n{text_table(header, rows, numeric=numeric)}"


def _bits(bits: int | None) -> str:
    return "carrier" if bits is None else str(bits)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _show_quantized(quantized: QuantizedUNet, *, as_json: bool) -> None:
    report = quantized.lowering_report()
    raises, channels, alone = (quantized.calibration.get(key, []) for key in ("raises", "channels", "left_alone"))
    if not as_json:
        print(report)
        print()
        print(quality_line(quantized.calibration))
        decisions = [(", ".join(row["layers"]), row["kind"], _bits(row["bits"]), row["reason"]) for row in raises]
        print(_section("raised above the config", ("layer", "what", "bits", "why"), decisions, numeric=(2,)))
        widest = [(row["layer"], *channel_cells(row)) for row in channels[:_WORST]]
        print(_section("channels that differ most", _CHANNELS, widest, numeric=(1, 2, 4)))
        reasons = [(row["reason"], _few(row["tensors"])) for row in alone]
        print(_section("attention operands without channel factors", ("why", "operands"), reasons, numeric=()))
        return
    rows = [
        {name: getattr(row, name) for name in ("node", "layer", "kernel", "dtype", "bytes", "fallback", "reason")}
        for row in report.rows
    ]
    quality = quantized.calibration.get("quality", {})
    document = {"backend": report.backend, "bytes": report.total_bytes, "quality": quality, "raises": raises}
    print(json.dumps(document | {"channels": channels, "left_alone": alone, "nodes": rows}, indent=1))
