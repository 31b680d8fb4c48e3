"""The charts of a demo, quantize or evaluate run, from its document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdiff_fx.report.charts import Bar, BarGroup, Series, band_chart, bar_chart, finite_or_none, line_chart
from qdiff_fx.report.names import short_name
from qdiff_fx.report.page import Chart, Key

ARM_NAMES: Mapping[str, str] = {
    "rtn": "round to nearest",
    "mse": "MSE ranges, no split",
    "mse-split": "MSE ranges, split",
    "ours": "ours",
}
_DRAWN = ("w8a8", "w4a8", "as stored")
_PARTS = (("deep path", "ours"), ("skip connection", "mse"), ("third part", "mse-split"), ("fourth part", "rtn"))


def error_growth_chart(run: Mapping[str, Any]) -> Chart | None:
    """Relative error of the sample after each step."""
    series = [
        _series(row, [(step, value) for step, value in enumerate(row["error_by_step"], start=1)]) for row in _arms(run)
    ]
    if not any(line.points for line in series):
        return None
    figure = line_chart(series, x_label="sampling step", y_label="relative error", log=True)
    return Chart(title="Drift of the sample from full precision", figure=figure, keys=_keys(series))


def sqnr_chart(run: Mapping[str, Any]) -> Chart | None:
    """Output SQNR at each noise level."""
    series = [_series(row, row["sqnr_by_timestep"]) for row in _arms(run)]
    by_timestep = (run.get("quality") or {}).get("by_timestep")
    if by_timestep:
        series.append(Series(label="held-out inputs", colour="ours", points=_points(by_timestep)))
    if not any(line.points for line in series):
        return None
    figure = line_chart(
        series, x_label="timestep (sampling goes from left to right)", y_label="output SQNR", unit="dB", backwards=True
    )
    return Chart(title="Output SQNR by timestep [dB]", figure=figure, keys=_keys(series))


def shortcut_chart(run: Mapping[str, Any]) -> Chart | None:
    """Ranges of the parts of every split shortcut."""
    shown = [row for row in run.get("shortcuts") or () if row["range_ratio"] is not None]
    if not shown:
        return None
    groups = [
        BarGroup(
            label=short_name(str(row["layer"])),
            note=f"{row['range_ratio']:.2f}×",
            bars=tuple(
                Bar(
                    low=min(float(part["minimum"]), 0.0),
                    high=max(float(part["maximum"]), 0.0),
                    colour=_PARTS[index % len(_PARTS)][1],
                    tip=f"{_PARTS[index % len(_PARTS)][0]}, {part['channels']} channels: "
                    f"{part['minimum']:.2f} to {part['maximum']:.2f}",
                )
                for index, part in enumerate(row["parts"])
            ),
        )
        for row in shown
    ]
    parts = max(len(row["parts"]) for row in shown)
    keys = tuple(Key(label=label, colour=colour) for label, colour in _PARTS[:parts])
    figure = bar_chart(groups, x_label="activation value; at the right, wider range ÷ narrower")
    return Chart(title="Parts of the split shortcuts", figure=figure, keys=keys)


def activation_charts(run: Mapping[str, Any]) -> Chart | None:
    """The activations whose range changes most over the timesteps, a small chart each."""
    shown = [row for row in run.get("ranges") or () if len(row["by_timestep"]) > 1]
    if not shown:
        return None
    charts = tuple(
        band_chart(
            str(row["name"]),
            [(float(at), float(low), float(high)) for at, low, high in row["by_timestep"]],
            grid_edges(row),
            title=short_name(str(row["name"])),
        )
        for row in shown
    )
    return Chart(title="Ranges that change over the timesteps", figure=charts[0], small=charts)


def reconstruction_chart(run: Mapping[str, Any]) -> Chart | None:
    """Loss of every block before and after learning."""
    shown = [row for row in run.get("reconstruction") or () if _losses(row) is not None]
    if not shown:
        return None
    groups = []
    for row in shown:
        before, after = _losses(row) or (0.0, 0.0)
        bars = (
            Bar(low=0.0, high=before, colour="reference", tip=f"before: {before:.3g}"),
            Bar(low=0.0, high=after, colour="ours", tip=f"after: {after:.3g}"),
        )
        phase = f", {row['phase']}" if row.get("phase") else ""
        note = f"{after / before:.2f}×" if before > 0 else ""
        groups.append(BarGroup(label=short_name(str(row["name"])) + phase, bars=bars, note=note))
    keys = (Key(label="before", colour="reference"), Key(label="after", colour="ours"))
    return Chart(title="Loss by block", figure=bar_chart(groups, x_label="block loss", log=True), keys=keys)


def grid_edges(row: Mapping[str, Any]) -> tuple[float, float]:
    """What the quantizer's lowest and highest code stand for."""
    highest = 2 ** int(row["bits"]) - 1
    scale, zero_point = float(row["scale"]), int(row["zero_point"])
    return -zero_point * scale, (highest - zero_point) * scale


def _losses(row: Mapping[str, Any]) -> tuple[float, float] | None:
    before, after = row.get("initial_loss"), row.get("learned_loss")
    return None if before is None or after is None else (float(before), float(after))


def _arms(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows that are drawn: one preset of four bits, one of eight; the worst comes first in the legend."""
    rows = [row for row in run.get("table") or () if row["preset"] in _DRAWN and row["arm"] != "mse-split"]
    return sorted(rows, key=lambda row: -(row["error_by_step"] or [0.0])[-1])


def _series(row: Mapping[str, Any], points: Sequence[Sequence[Any]]) -> Series:
    preset = str(row["preset"])
    known = ARM_NAMES.get(str(row["arm"]), str(row["arm"]))
    return Series(
        label=str(row["title"]) if preset == "as stored" else f"{known} {preset.upper()}",
        colour=str(row["arm"]) if row["arm"] in ARM_NAMES else "reference",
        points=_points(points),
        dashed=preset == "w8a8",
    )


def _points(pairs: Sequence[Sequence[Any]]) -> tuple[tuple[float, float | None], ...]:
    return tuple((float(x), finite_or_none(None if y is None else float(y))) for x, y in pairs)


def _keys(series: Sequence[Series]) -> tuple[Key, ...]:
    return tuple(Key(label=line.label, colour=line.colour, dashed=line.dashed) for line in series)
