"""The headline figures of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qdiff_fx.report.page import Card
from qdiff_fx.report.tables import decibels, file_size, percent


def cards(run: Mapping[str, Any]) -> tuple[Card, ...]:
    """Size, speed where it was measured, and quality against full precision."""
    return (*_sizes(run), *_speeds(run), *_pictures(run), *_outputs(run), *_layers(run))


def _sizes(run: Mapping[str, Any]) -> Iterator[Card]:
    sizes = run.get("sizes") or {}
    full = sizes.get("fp32")
    for name, count in sizes.items():
        if name.startswith("fp"):
            continue
        if not full:
            yield Card(label="stored weights", value=file_size(count))
            continue
        yield Card(
            label=f"{name.upper()} weights",
            value=f"{full / count:.1f}×",
            unit="smaller",
            detail=f"{file_size(count)}, {percent(count / full)} of {file_size(full)} in FP32",
        )


def _speeds(run: Mapping[str, Any]) -> Iterator[Card]:
    """Seconds a step, in runs that timed both networks: on the wall clock, so other work beside them counts."""
    samples = (run.get("settings") or {}).get("samples")
    batch = f" of {samples} samples" if samples else ""
    reference = (run.get("reference") or {}).get("seconds_per_step")
    for row in run.get("table") or ():
        seconds = row.get("seconds_per_step")
        if row["arm"] == "ours" and seconds and reference:
            yield Card(
                label=f"{row['preset'].upper()} speed",
                value=f"{reference / seconds:.2f}×",
                unit="of full precision's",
                detail=f"{1e3 * seconds:.1f} ms a step{batch}, {1e3 * reference:.1f} ms in full precision; "
                "neither is compiled",
            )


def _pictures(run: Mapping[str, Any]) -> Iterator[Card]:
    rows = {(row["arm"], row["preset"]): row for row in run.get("table") or ()}
    order = list(run.get("sizes") or {})
    for (arm, preset), row in sorted(
        rows.items(), key=lambda item: order.index(item[0][1]) if item[0][1] in order else 0
    ):
        if arm == "ours":
            baseline = rows.get(("rtn", preset))
            compared = f"; rounded to nearest: {decibels(baseline['psnr_median_db'])} dB" if baseline else ""
            yield Card(
                label=f"{preset.upper()} pictures",
                value=decibels(row["psnr_median_db"]),
                unit="dB PSNR",
                detail=f"against full precision, same noise{compared}",
            )


def _outputs(run: Mapping[str, Any]) -> Iterator[Card]:
    quality = run.get("quality") or {}
    if "pooled_db" in quality:
        yield Card(
            label="network output",
            value=decibels(quality.get("median_db")),
            unit="dB SQNR",
            detail=f"median over timesteps on {quality.get('samples')} held-out inputs; "
            f"{decibels(quality['pooled_db'])} dB pooled",
        )
        return
    for row in run.get("table") or ():
        if run.get("kind") == "evaluate":
            yield Card(
                label="network output",
                value=decibels(row["sqnr_median_db"]),
                unit="dB SQNR",
                detail=f"median over timesteps; {decibels(row['sqnr_pooled_db'])} dB pooled",
            )


def _layers(run: Mapping[str, Any]) -> Iterator[Card]:
    layers = [row for row in run.get("layers") or () if row.get("weight_bits") or row.get("activation_bits")]
    if layers:
        integer = [row for row in layers if row.get("activation_bits") and not row.get("fallback")]
        yield Card(
            label="on integers",
            value=f"{len(integer)}",
            unit=f"of {len(run['layers'])}",
            detail="layers and attentions multiply integers",
        )
