"""The plots of a report, as PNG files. One colour stands for one arm everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qdiff_fx.report.names import short_name
from qdiff_fx.report.run_charts import grid_edges
from qdiff_fx.safe_io import replacing

INK, MUTED, GRID = "#1f2933", "#66727f", "#e3e7eb"
COLOURS: Mapping[str, str] = {
    "reference": "#66727f",
    "rtn": "#d1495b",
    "mse": "#e09f3e",
    "mse-split": "#7a9e7e",
    "ours": "#00798c",
}
_STYLE = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}
_DPI = 180
_SIZE = (5.4, 4.3)
"""Inches; two plots stand side by side in a report."""


def plot_error_growth(path: Path, curves: Sequence[Mapping[str, Any]]) -> None:
    """Relative error against full precision after each sampling step, on a log scale.

    Args:
      curves: dicts of "label", "colour" (a key of COLOURS), "errors" (one a step) and perhaps "dashed".
    """
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            steps = range(1, len(curve["errors"]) + 1)
            axes.semilogy(
                steps,
                curve["errors"],
                color=COLOURS[curve["colour"]],
                linestyle="--" if curve.get("dashed") else "-",
                linewidth=2,
                label=curve["label"],
            )
        axes.set_xlabel("sampling step")
        axes.set_ylabel("relative error against full precision")
        axes.margins(x=0.01)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9, handlelength=3.2)
        _save(figure, path)


def plot_sqnr_by_timestep(path: Path, curves: Sequence[Mapping[str, Any]]) -> None:
    """Output SQNR at each noise level; sampling runs from left to right.

    Args:
      curves: as in `plot_error_growth`, with "sqnr": [timestep, dB] pairs.
    """
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            timesteps, decibels = zip(*curve["sqnr"], strict=True)
            axes.plot(
                timesteps,
                decibels,
                color=COLOURS[curve["colour"]],
                linestyle="--" if curve.get("dashed") else "-",
                linewidth=2,
                marker="o",
                markersize=3,
                label=curve["label"],
            )
        axes.invert_xaxis()
        axes.set_xlabel("timestep (sampling goes from left to right)")
        axes.set_ylabel("output SQNR [dB]")
        figure.legend(loc="outside lower center", ncols=2, fontsize=9, handlelength=3.2)
        _save(figure, path)


def plot_activation_ranges(path: Path, quantizers: Sequence[Mapping[str, Any]]) -> None:
    """Minimum and maximum of a few activations over the timesteps, one small plot each, with the quantizer's range.

    Args:
      quantizers: rows of a CalibrationReport; those with fewer than 2 timesteps are left out.
    """
    shown = [row for row in quantizers if len(row["by_timestep"]) > 1]
    columns = min(2, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(_SIZE[0], 1.4 * rows + 0.3), layout="constrained")
        for index, row in enumerate(shown):
            axes = figure.add_subplot(rows, columns, index + 1)
            timesteps, minima, maxima = zip(*row["by_timestep"], strict=True)
            axes.fill_between(timesteps, minima, maxima, color=COLOURS["ours"], alpha=0.22, linewidth=0)
            axes.plot(timesteps, minima, color=COLOURS["ours"], linewidth=1.3)
            axes.plot(timesteps, maxima, color=COLOURS["ours"], linewidth=1.3)
            for edge in grid_edges(row):
                axes.axhline(edge, color=COLOURS["rtn"], linewidth=1, linestyle=":")
            axes.invert_xaxis()
            axes.set_title(short_name(str(row["name"])), fontsize=8)
            axes.tick_params(labelsize=8)
        figure.supxlabel("timestep", fontsize=9.5)
        figure.supylabel("activation value", fontsize=9.5)
        _save(figure, path)


def plot_shortcut_ranges(path: Path, shortcuts: Sequence[Mapping[str, Any]]) -> None:
    """Ranges of the parts of every shortcut, side by side.

    Args:
      shortcuts: rows of `Inspection.to_dict()["shortcuts"]`; those whose ranges are unknown are left out.
    """
    shown = [row for row in shortcuts if row["range_ratio"] is not None]
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(_SIZE[0], 0.36 * len(shown) + 1.2), layout="constrained")
        axes = figure.add_subplot()
        colours = (COLOURS["ours"], COLOURS["mse"], COLOURS["mse-split"], COLOURS["rtn"])
        limit = max((abs(edge) for row in shown for part in row["parts"] for edge in _edges(part)), default=1.0)
        for position, row in enumerate(shown):
            height = 0.76 / len(row["parts"])
            for index, part in enumerate(row["parts"]):
                low, high = _edges(part)
                axes.barh(
                    position - 0.38 + (index + 0.5) * height,
                    high - low,
                    left=low,
                    height=height * 0.9,
                    color=colours[index % len(colours)],
                    label=_PARTS[index] if position == 0 and index < len(_PARTS) else None,
                )
            axes.text(1.02 * limit, position, f"{row['range_ratio']:.2f}×", va="center", fontsize=8.5, color=INK)
        axes.set_yticks(range(len(shown)), [short_name(str(row["layer"])) for row in shown], fontsize=8.5)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_xlim(-1.05 * limit, 1.16 * limit)
        axes.set_xlabel("activation value; at the right, wider range ÷ narrower")
        figure.legend(loc="outside upper left", ncols=2, fontsize=9, handlelength=3.2)
        _save(figure, path)


_PARTS = ("deep path", "skip connection")


def _edges(part: Mapping[str, Any]) -> tuple[float, float]:
    return min(float(part["minimum"]), 0.0), max(float(part["maximum"]), 0.0)


def clean_axes(axes: Axes) -> None:
    """No ticks and no frame: for pictures."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, atomically."""
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=_DPI, facecolor="white")


def plot_slacks(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Both yardsticks over the slack that was spent, a column a kind of slack.

    Args:
      rows: dicts of "model", "ranking" ("estimate" or "exact"), "rounding" ("nearest" or "learned"), "kind", "slack",
        "median_db" and "endpoint_db".
    """
    colours = {
        ("nearest", "estimate"): "mse",
        ("nearest", "exact"): "rtn",
        ("learned", "estimate"): "ours",
        ("learned", "exact"): "mse-split",
    }
    kinds = tuple(dict.fromkeys(row["kind"] for row in rows))
    labelled: dict[str, Any] = {}
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(_SIZE[0] * max(1, len(kinds)), _SIZE[1]), layout="constrained")
        for column, kind in enumerate(kinds):
            axes = figure.add_subplot(1, len(kinds), column + 1)
            axes.set_title(f"{kind} slack")
            axes.set_xlabel("more bytes, %" if kind == "weight" else "multiplications in the carrier type, %")
            axes.set_ylabel("dB against full precision")
            curves: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
            for row in rows:
                if row["kind"] == kind:
                    curves.setdefault((row["model"], row["rounding"], row["ranking"]), []).append(row)
            for (model, rounding, ranking), points in curves.items():
                dashed = model != rows[0]["model"]
                for name, marker in (("median_db", "o"), ("endpoint_db", "^")):
                    (line,) = axes.plot(
                        [100 * point["slack"] for point in points],
                        [point[name] for point in points],
                        color=COLOURS[colours[rounding, ranking]],
                        marker=marker,
                        markersize=4,
                        linestyle="--" if dashed else "-",
                    )
                    label = f"{model}, {rounding}, {ranking}: {'median SQNR' if marker == 'o' else 'end point'}"
                    labelled.setdefault(label, line)
        figure.legend(labelled.values(), labelled, fontsize=7, ncols=3, handlelength=4, loc="outside lower center")
        _save(figure, path)
