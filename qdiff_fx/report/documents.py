"""The JSON documents that runs leave behind: all that a report shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qdiff_fx.calibration.channels import widest_channels
from qdiff_fx.calibration.report import CalibrationReport
from qdiff_fx.evaluation import confident_share
from qdiff_fx.evaluation.study import Measurement
from qdiff_fx.graph.meta import BLOCK, LAYER
from qdiff_fx.kernels.machine import describe_machine
from qdiff_fx.lowering import LoweringReport
from qdiff_fx.model import QuantizedUNet
from qdiff_fx.numerics.metrics import finite_or_none
from qdiff_fx.report.block_graph import block_graph
from qdiff_fx.report.inspection import Inspection

_FP32, _FP16 = 4, 2


def stored_bytes(folder: Path) -> int:
    """Bytes of a quantized network on disk: safetensors and plan.json, without contexts that lie beside them."""
    weights = [path for path in folder.glob("*.safetensors") if path.name != "context.safetensors"]
    return sum(path.stat().st_size for path in (*weights, folder / "plan.json"))


def full_precision_sizes(inspection: Inspection) -> dict[str, int]:
    """Bytes of all parameters in fp32 and fp16."""
    parameters = sum(row.parameters for row in inspection.sizes)
    return {"fp32": _FP32 * parameters, "fp16": _FP16 * parameters}


def layer_rows(
    inspection: Inspection, lowering: LoweringReport, sensitivity: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """A row a layer and attention of the integer model: bits, bytes, kernel, reason, block, predicted error.

    Args:
      sensitivity: of a CalibrationReport; () leaves every "error" None.
    """
    errors = {row["name"]: row["error"] for row in sensitivity}
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
                "fallback": row.fallback,
                "reason": row.reason,
                "block": layer.block if layer else None,
                "error": errors.get(row.layer),
            }
        )
    return rows


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
        "layers": layer_rows(inspection, quantized.lowering_report(), report.sensitivity),
        "graph": block_graph(quantized.plan),
        "backend": quantized.backend,
        "quality": report.quality,
        "reconstruction": list(report.reconstruction),
        "factors": list(report.factors),
        "channels": widest_channels(report.factors),
        "raises": list(report.raises),
        "total_seconds": report.seconds,
    }


def stored_document(name: str, quantized: QuantizedUNet, stored: int) -> dict[str, Any]:
    """What a quantized network tells by itself, without the run that made it: for report.html of a saved folder."""
    calibration = quantized.calibration
    return {
        "kind": "quantize",
        "model": {"name": name, "preset": "quantized"},
        "machine": describe_machine(),
        "calibration": {"rows": calibration.get("samples"), "timesteps": calibration.get("timesteps", [])},
        "sizes": {"quantized": stored},
        "quality": calibration.get("quality", {}),
        "channels": calibration.get("channels", []),
        **network_entries(quantized),
    }


def network_entries(quantized: QuantizedUNet) -> dict[str, Any]:
    """Entries "layers", "graph", "backend" and "raises" of a document, from the network alone."""
    policies = {
        policy.name: (policy, BLOCK.get(node))
        for node in quantized.plan.graph.nodes
        if (policy := LAYER.get(node)) is not None
    }
    rows = []
    for row in quantized.lowering_report().rows:
        policy, block = policies.get(row.layer, (None, None))
        rows.append(
            {
                "name": row.layer,
                "weight_bits": policy.weight.bits if policy and policy.weight else None,
                "activation_bits": policy.activation.bits if policy and policy.activation else None,
                "bytes": row.bytes,
                "kernel": row.kernel,
                "fallback": row.fallback,
                "reason": row.reason,
                "block": block,
            }
        )
    return {
        "layers": rows,
        "graph": block_graph(quantized.plan),
        "backend": quantized.backend,
        "raises": quantized.calibration.get("raises", []),
    }


def table_row(arm: str, title: str, preset: str, measurement: Measurement, *, classified: bool) -> dict[str, Any]:
    """One row of a run's "table", with what the plots need; `classified` where the bundled classifier applies."""
    return {
        "arm": arm,
        "title": title,
        "preset": preset,
        "sqnr_pooled_db": finite_or_none(measurement.sqnr.pooled_db),
        "sqnr_median_db": finite_or_none(measurement.sqnr.median_db),
        "sqnr_by_timestep": [[timestep, finite_or_none(db)] for timestep, db in measurement.sqnr.by_timestep.items()],
        "psnr_median_db": finite_or_none(measurement.psnr.median_db),
        "psnr_by_sample": [finite_or_none(value) for value in measurement.psnr.by_sample],
        "error_by_step": list(measurement.error_by_step),
        "confident_share": confident_share(measurement.images) if classified else None,
    }


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
