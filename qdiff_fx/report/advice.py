"""Warnings of a report: what may be wrong with a run, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qdiff_fx.report.layer_section import known_layers
from qdiff_fx.report.page import Advice
from qdiff_fx.report.tables import decibels, file_size

_GOOD_DB = 10.0
"""Output SQNR below which calibration calls a result doubtful."""

_NAMED = 3


def advice(run: Mapping[str, Any]) -> tuple[Advice, ...]:
    """Warnings first, then notes."""
    found = [*_quality(run), *_baselines(run), *_calibration(run), *_kernels(run), *_raises(run)]
    return tuple(sorted(found, key=lambda item: item.level != "warning"))


def _quality(run: Mapping[str, Any]) -> Iterator[Advice]:
    quality = run.get("quality") or {}
    if quality and not quality.get("accepted", True):
        yield Advice(
            level="warning",
            text=f"The output keeps only {decibels(quality.get('pooled_db'))} dB of SQNR pooled and "
            f"{decibels(quality.get('median_db'))} dB in the median over timesteps: its pictures are likely "
            f"ruined.{_worst(run)}",
            remedy="quantize again with --target-sqnr 20 (QDiffConfig(target_sqnr=20.0)), or --preset w8a8",
        )
    for name, pairs in (
        ("", quality.get("by_timestep") or ()),
        *((f"{row['title']}, {row['preset'].upper()}: ", row["sqnr_by_timestep"]) for row in _ours(run)),
    ):
        low = [(timestep, value) for timestep, value in pairs if value is not None and value < _GOOD_DB]
        if low and len(low) < len(pairs):
            worst = min(low, key=lambda item: item[1])
            yield Advice(
                level="warning",
                text=f"{name}{len(low)} of {len(pairs)} timesteps keep less than {_GOOD_DB:g} dB, the worst "
                f"{worst[1]:.1f} dB at timestep {worst[0]:g}.",
                remedy="collect calibration data at more timesteps (--timesteps), or raise activation_slack",
            )


def _worst(run: Mapping[str, Any]) -> str:
    """A sentence on the layers and attentions with the largest error alone, "" where none is known."""
    known = [layer for layer in known_layers(run) if layer.get("error")]
    names = [str(layer["name"]) for layer in sorted(known, key=lambda layer: -float(layer["error"]))[:_NAMED]]
    return f" Quantized alone, {', '.join(names)} cost the most." if names else ""


def _baselines(run: Mapping[str, Any]) -> Iterator[Advice]:
    """Where the method loses to a simpler way, the report says so."""
    yardsticks = {"sqnr_pooled_db": "pooled SQNR", "sqnr_median_db": "median SQNR", "psnr_median_db": "end-point PSNR"}
    for row in _ours(run):
        for other in run.get("table") or ():
            if other["arm"] == "ours" or other["preset"] != row["preset"]:
                continue
            lost = [
                f"{title} {row[name]:.1f} against {other[name]:.1f} dB"
                for name, title in yardsticks.items()
                if row.get(name) is not None and other.get(name) is not None and row[name] < other[name]
            ]
            if lost:
                yield Advice(
                    level="note",
                    text=f"{row['preset'].upper()}: “{other['title']}” is ahead in {', '.join(lost)}.",
                    remedy="judge by the end point and by the pictures; more samples narrow the figures",
                )


def _calibration(run: Mapping[str, Any]) -> Iterator[Advice]:
    calibration = run.get("calibration") or {}
    rows, timesteps = calibration.get("rows"), len(calibration.get("timesteps") or ())
    if rows and timesteps and rows < 10 * timesteps:
        yield Advice(
            level="note",
            text=f"{rows} calibration inputs at {timesteps} timesteps are too few to set a tenth aside: quality was "
            "measured on inputs that were also fitted.",
            remedy=f"collect at least 10 inputs a timestep (--samples {max(16, -(-rows // timesteps) * 4)})",
        )


def _kernels(run: Mapping[str, Any]) -> Iterator[Advice]:
    layers = run.get("layers") or ()
    slow = [row for row in layers if row.get("fallback")]
    for reason in dict.fromkeys(str(row["fallback"]) for row in slow):
        names = [str(row["name"]) for row in slow if row["fallback"] == reason]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield Advice(
            level="note",
            text=f"{len(names)} of {len(layers)} rows do not run on integers ({reason}): "
            f"{', '.join(names[:_NAMED])}{more}.",
            remedy="choose another backend (--backend), or convert(strict=True) to refuse such a model",
        )
    if (run.get("settings") or {}).get("backend", run.get("backend")) == "reference":
        yield Advice(
            level="note",
            text="The integer model ran on the reference backend, which is exact and slow.",
            remedy="AVX2 and a C++ compiler (backend x86) or an NVIDIA GPU (backend cuda) bring speed",
        )


def _raises(run: Mapping[str, Any]) -> Iterator[Advice]:
    raises = run.get("raises") or ()
    if raises:
        carrier = sum(1 for row in raises if row.get("bits") is None)
        size = (run.get("sizes") or {}).get((run.get("model") or {}).get("preset"))
        cost = f" The model takes {file_size(size)} with them." if size else ""
        yield Advice(
            level="note",
            text=f"{len(raises)} quantizers got more than the preset asks for, because they cause most of the error "
            f"({carrier} stay in the carrier type).{cost}",
            remedy="weight_slack and activation_slack of QDiffConfig set how much may be spent; 0 turns it off",
        )


def _ours(run: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (row for row in run.get("table") or () if row["arm"] == "ours")
