"""The JSON documents that runs leave behind, and the headline figures that a report shows of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qdiff_fx.calibration.report import CalibrationReport
from qdiff_fx.evaluation import confident_share
from qdiff_fx.evaluation.study import Measurement
from qdiff_fx.lowering import LoweringReport
from qdiff_fx.model import QuantizedUNet
from qdiff_fx.report.inspection import Inspection
from qdiff_fx.report.machine import describe_machine
from qdiff_fx.report.tables import decibels, file_size, percent

_FP32, _FP16 = 4, 2


def stored_bytes(folder: Path) -> int:
    """Bytes of a quantized network on disk: safetensors and plan.json, without contexts that lie beside them."""
    weights = [path for path in folder.glob("*.safetensors") if path.name != "context.safetensors"]
    return sum(path.stat().st_size for path in (*weights, folder / "plan.json"))


def full_precision_sizes(inspection: Inspection) -> dict[str, int]:
    """Bytes of all parameters in fp32 and fp16."""
    parameters = sum(row.parameters for row in inspection.sizes)
    return {"fp32": _FP32 * parameters, "fp16": _FP16 * parameters}


def layer_rows(inspection: Inspection, lowering: LoweringReport) -> list[dict[str, Any]]:
    """A row a layer and attention of the integer model: bits, bytes before and after, kernel, reason."""
    layers = {row.name: row for row in inspection.layers}
    attentions = {row.name: row for row in inspection.attentions}
    rows = []
    for row in lowering.rows:
        layer, attention = layers.get(row.layer), attentions.get(row.layer)
        rows.append(
            {
                "name": row.layer,
                "weight_bits": layer.weight_bits if layer else None,
                "activation_bits": layer.activation_bits if layer else attention.operand_bits if attention else None,
                "bytes": row.bytes,
                "bytes_before": layer.bytes_before if layer else 0,
                "kernel": row.kernel,
                "reason": row.fallback or (layer.reason if layer and layer.reason != "config" else ""),
            }
        )
    return rows


def widest_channels(factors: Sequence[Mapping[str, Any]], count: int = 8) -> list[dict[str, Any]]:
    """The quantized tensors whose channels differ most in range, before and after their factors."""
    tried = [row for row in factors if not row["reason"] and row["spread"] > 1.0]
    worst = sorted(tried, key=lambda row: -float(row["spread"]))[:count]
    return [
        {
            "layer": ", ".join(row["layers"]),
            "spread": row["spread"],
            "spread_after": row["spread_after"],
            "gain_db": row["gain_db"],
            "exponent": row["exponent"],
        }
        for row in worst
    ]


def calibration_document(
    model: str, preset: str, report: CalibrationReport, inspection: Inspection, quantized: QuantizedUNet, stored: int
) -> dict[str, Any]:
    """What `qdiff-fx quantize` leaves behind as calibration.json."""
    return {
        "kind": "quantize",
        "model": {"name": model, "preset": preset},
        "machine": describe_machine(),
        "calibration": {"rows": report.samples, "timesteps": list(report.timesteps), "seconds": report.seconds},
        "sizes": full_precision_sizes(inspection) | {preset: stored},
        "shortcuts": inspection.to_dict()["shortcuts"],
        "layers": layer_rows(inspection, quantized.lowering_report()),
        "quality": report.quality,
        "factors": list(report.factors),
        "channels": widest_channels(report.factors),
        "raises": list(report.raises),
        "total_seconds": report.seconds,
    }


def table_row(arm: str, title: str, preset: str, measurement: Measurement, *, classified: bool) -> dict[str, Any]:
    """One row of a run's "table", with what the plots need; `classified` where the bundled classifier applies."""
    return {
        "arm": arm,
        "title": title,
        "preset": preset,
        "sqnr_pooled_db": finite(measurement.sqnr.pooled_db),
        "sqnr_median_db": finite(measurement.sqnr.median_db),
        "sqnr_by_timestep": [[timestep, finite(value)] for timestep, value in measurement.sqnr.by_timestep.items()],
        "psnr_median_db": finite(measurement.psnr.median_db),
        "psnr_by_sample": [finite(value) for value in measurement.psnr.by_sample],
        "error_by_step": list(measurement.error_by_step),
        "confident_share": confident_share(measurement.images) if classified else None,
    }


def finite(value: float) -> float | None:
    """JSON has no infinity: None stands for equal signals."""
    return value if math.isfinite(value) else None


def cards(run: Mapping[str, Any]) -> list[dict[str, str]]:
    """The headline figures of a run: size and quality of its integer models."""
    rows = {(row["arm"], row["preset"]): row for row in run.get("table", ())}
    sizes = run.get("sizes", {})
    result = []
    for preset in (name for name in sizes if not name.startswith("fp")):
        share = sizes[preset] / sizes["fp32"]
        result.append(
            {
                "label": f"{preset.upper()} weights",
                "value": f"{1 / share:.1f}×",
                "unit": "smaller",
                "detail": f"{file_size(sizes[preset])}, {percent(share)} of {file_size(sizes['fp32'])} in FP32",
            }
        )
    for (arm, preset), row in rows.items():
        if arm != "ours":
            continue
        baseline = rows.get(("rtn", preset))
        comparison = f"; rounded to nearest: {decibels(baseline['psnr_median_db'])} dB" if baseline else ""
        result.append(
            {
                "label": f"{preset.upper()} pictures",
                "value": decibels(row["psnr_median_db"]),
                "unit": "dB PSNR",
                "detail": f"against full precision, same noise{comparison}",
            }
        )
    return result


def most_varying(quantizers: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """The `count` activations whose range changes most over the timesteps, in network order, without channel maxima.

    Tensors that several layers read through quantizers of their own (the time embedding) count once.
    """

    def variation(row: Mapping[str, Any]) -> float:
        spans = [high - low for _, low, high in row["by_timestep"]]
        return max(spans) / max(min(spans), 1e-12) if len(spans) > 1 else 0.0

    distinct = list({json.dumps(row["by_timestep"]): row for row in reversed(quantizers)}.values())[::-1]
    chosen = sorted(range(len(distinct)), key=lambda index: -variation(distinct[index]))[:count]
    return [
        {key: value for key, value in distinct[index].items() if key != "channel_maxima"} for index in sorted(chosen)
    ]
