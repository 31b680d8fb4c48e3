"""The charts of a report: inline SVG drawn from data. Every mark says what it stands for, on hover and by keyboard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from markupsafe import Markup

from qdiff_fx.report.svg import WIDTH, Axis, axis, canvas, element, grid_x, grid_y, markup, number, path, tip

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 270.0, 46.0, 10.0, 12.0, 40.0
_ROW, _BAR = 16.0, 9.0


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line.

    Args:
      label: what the legend says.
      colour: a class of report.css: "ours", "rtn", "mse", "mse-split" or "reference".
      points: (x, y), y None where there is nothing to draw (an infinite ratio).
      dashed: for the second of two lines of one colour.
    """

    label: str
    colour: str
    points: tuple[tuple[float, float | None], ...]
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A horizontal bar from `low` to `high`; `tip` is shown on hover."""

    low: float
    high: float
    colour: str
    tip: str


@dataclass(frozen=True, kw_only=True)
class BarGroup:
    """Bars under one name; `note` stands at the right."""

    label: str
    bars: tuple[Bar, ...]
    note: str = ""


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, unit: str = "", log: bool = False, backwards: bool = False
) -> Markup:
    """Lines over one horizontal axis.

    Args:
      unit: behind the values on hover.
      log: whether the vertical axis is logarithmic.
      backwards: whether x falls from left to right, as the timestep does while sampling.
    """
    root = canvas(WIDTH, _HEIGHT, f"{y_label} by {x_label}")
    bottom, right = _HEIGHT - _BOTTOM, WIDTH - _RIGHT
    xs = sorted({x for line in series for x, _ in line.points})
    ends = (right, _LEFT) if backwards else (_LEFT, right)
    x_axis = axis(xs, *ends, margin=0.02)
    y_axis = axis([y for line in series for _, y in line.points if y is not None], bottom, _TOP, log=log)
    grid_y(root, y_axis, _LEFT, right)
    grid_x(root, x_axis, bottom)
    element(root, "text", x_label, x=(_LEFT + right) / 2, y=_HEIGHT - 6, class_="label middle")
    for line in series:
        drawn = tuple((x, y if y is not None and (y > 0 or not log) else None) for x, y in line.points)
        element(root, "path", d=path(drawn, x_axis, y_axis), class_=_classes("line", line))
    for index, at in enumerate(xs):
        _column(root, series, xs, index, x_axis, y_axis, title=f"{x_label.partition(' (')[0]} {number(at)}", unit=unit)
    return markup(root)


def _column(
    root: Element,
    series: Sequence[Series],
    xs: Sequence[float],
    index: int,
    x_axis: Axis,
    y_axis: Axis,
    *,
    title: str,
    unit: str,
) -> None:
    """The invisible column around one x that shows, when pointed at, every line's value there."""
    position = x_axis(xs[index])
    edges = [x_axis(xs[max(index - 1, 0)]), x_axis(xs[min(index + 1, len(xs) - 1)])]
    halves = sorted((position + edge) / 2 for edge in edges)
    left = halves[0] if halves[0] < position else _LEFT
    right = halves[1] if halves[1] > position else WIDTH - _RIGHT
    column = element(root, "g", class_="hit")
    lines = [title]
    element(column, "rect", x=left, y=_TOP, width=max(right - left, 1.0), height=y_axis.start - _TOP, class_="area")
    element(column, "line", x1=position, x2=position, y1=_TOP, y2=y_axis.start, class_="mark cursor")
    for line in series:
        known = dict(line.points)
        if xs[index] not in known:
            continue
        value = known[xs[index]]
        lines.append(f"{line.label}: {'∞' if value is None else number(value)} {unit}".rstrip())
        if value is not None and (value > 0 or not y_axis.log):
            element(column, "circle", cx=position, cy=y_axis(value), r=3.5, class_=f"mark dot {line.colour}")
    tip(column, "\n".join(lines))


def bar_chart(groups: Sequence[BarGroup], *, x_label: str, unit: str = "", log: bool = False) -> Markup:
    """Horizontal bars, a name above each group; the axis contains zero unless it is logarithmic."""
    height = sum(_ROW + 2 + _BAR * len(group.bars) for group in groups) + _BOTTOM + 4
    root = canvas(WIDTH, height, x_label)
    bottom = height - _BOTTOM
    edges = [edge for group in groups for bar in group.bars for edge in (bar.low, bar.high)]
    if log:
        scale = axis(edges, 8.0, WIDTH - 8.0, log=True, margin=0.02)
    else:
        low, high = min([0.0, *edges]), max([0.0, *edges])
        scale = Axis(low=1.02 * low, high=1.02 * high if high > low else 1.0, start=8.0, stop=WIDTH - 8.0)
    for value in scale.ticks():
        element(root, "line", x1=scale(value), x2=scale(value), y1=4.0, y2=bottom, class_="rule")
    grid_x(root, scale, bottom)
    element(root, "text", f"{x_label} [{unit}]" if unit else x_label, x=WIDTH / 2, y=height - 6, class_="label middle")
    top = 2.0
    for group in groups:
        element(root, "text", group.label, x=12, y=top + 13, class_="name")
        element(root, "text", group.note, x=WIDTH - 8, y=top + 13, class_="tick end")
        for index, bar in enumerate(group.bars):
            item = element(root, "g", class_="hit")
            left, right = scale(max(bar.low, scale.low)), scale(bar.high)
            at = top + _ROW + index * _BAR
            element(item, "rect", x=0, y=at - 1, width=WIDTH, height=_BAR, class_="area")
            element(
                item,
                "rect",
                x=left,
                y=at,
                width=max(right - left, 1.0),
                height=_BAR - 2,
                rx=2,
                class_=f"fill {bar.colour}",
            )
            tip(item, f"{group.label}\n{bar.tip}")
        top += _ROW + 2 + _BAR * len(group.bars)
    if not log:
        element(root, "line", x1=scale(0.0), x2=scale(0.0), y1=4.0, y2=bottom, class_="zero")
    return markup(root)


def band_chart(
    name: str, points: Sequence[tuple[float, float, float]], limits: tuple[float, float] | None, *, title: str
) -> Markup:
    """A small chart of a range over the timesteps, x falling from left to right.

    Args:
      points: (timestep, minimum, maximum).
      limits: dotted lines: what the quantizer's grid covers.
    """
    width, height, left = WIDTH / 2, 132.0, 34.0
    root = canvas(width, height, f"range of {name} by timestep")
    bottom = height - 22.0
    x_axis = axis([at for at, _, _ in points], width - 6, left, margin=0.0)
    y_axis = axis([*(edge for _, low, high in points for edge in (low, high)), *(limits or ())], bottom, 24.0)
    element(root, "text", title, x=left, y=13, class_="name")
    grid_y(root, Axis(low=y_axis.low, high=y_axis.high, start=bottom, stop=24.0), left, width - 6)
    grid_x(root, x_axis, bottom, count=3)
    ordered = sorted(points)
    outline = [(at, high) for at, _, high in ordered] + [(at, low) for at, low, _ in reversed(ordered)]
    element(root, "path", d=path(outline, x_axis, y_axis) + " Z", class_="band ours")
    for limit in limits or ():
        element(root, "line", x1=left, x2=width - 6, y1=y_axis(limit), y2=y_axis(limit), class_="limit rtn")
    step = (width - 6 - left) / max(1, len(ordered))
    for at, low, high in ordered:
        item = element(root, "g", class_="hit")
        element(item, "rect", x=x_axis(at) - step / 2, y=24, width=step, height=bottom - 24, class_="area")
        element(item, "line", x1=x_axis(at), x2=x_axis(at), y1=y_axis(low), y2=y_axis(high), class_="mark cursor")
        covered = "" if limits is None else f"\ngrid: {number(limits[0])} to {number(limits[1])}"
        tip(item, f"{name}\ntimestep {number(at)}: {number(low)} to {number(high)}{covered}")
    return markup(root)


def _classes(kind: str, line: Series) -> str:
    return f"{kind} {line.colour}" + (" dashed" if line.dashed else "")


def finite_or_none(value: float | None) -> float | None:
    """None for what cannot be drawn."""
    return value if value is not None and math.isfinite(value) else None
