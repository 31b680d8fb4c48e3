"""SVG elements and axes. Colours are classes, so that the page's light and dark schemes both apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

WIDTH = 440.0
"""Units of a figure's width: about the pixels of a phone, so that its text of 11 to 12 units stays readable there."""


def element(parent: Element | None, tag: str, text: str | None = None, **attributes: str | float) -> Element:
    """A new SVG element; `class_` stands for class and underscores for hyphens."""
    names = {name.rstrip("_").replace("_", "-"): _text(value) for name, value in attributes.items()}
    made = Element(tag, names) if parent is None else SubElement(parent, tag, names)
    made.text = text
    return made


def canvas(width: float, height: float, label: str, class_: str = "chart") -> Element:
    """An empty figure with a name for those who cannot see it; the keyboard can step through its parts."""
    return element(
        None,
        "svg",
        viewBox=f"0 0 {_text(width)} {_text(height)}",
        class_=class_,
        role="group",
        aria_label=label,
        tabindex="0",
    )


def tip(parent: Element, text: str) -> None:
    """What is shown on hover and on keyboard focus: lines of "name value"."""
    element(parent, "title", text)


def markup(root: Element) -> Markup:
    """The figure as HTML; everything in it is escaped."""
    return Markup(tostring(root, encoding="unicode"))  # the serializer escapes text and attributes


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A mapping from values to positions.

    Args:
      low, high: values at the ends, low < high; positive if `log`.
      start, stop: positions of `low` and `high`; stop < start runs backwards.
      log: whether equal ratios are equal distances.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._map(self.low), self._map(self.high)
        return self.start + (self._map(value) - low) / (high - low) * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the axis, about `count` of them; powers of ten on a log axis that spans two or more."""
        if self.log and math.log10(self.high / self.low) >= 2:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1)]
        step = _round_step((self.high - self.low) / max(1, count))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _map(self, value: float) -> float:
        return math.log10(value) if self.log else value


def axis(values: Sequence[float], start: float, stop: float, *, log: bool = False, margin: float = 0.05) -> Axis:
    """An axis over all finite `values` (if `log`, positive ones), with a margin; up to 1 if there are none."""
    usable = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = (min(usable), max(usable)) if usable else ((0.1, 1.0) if log else (0.0, 1.0))
    if log:
        spread = max((high / low) ** margin, 1.05)
        return Axis(low=low / spread, high=high * spread, start=start, stop=stop, log=True)
    spread = (high - low) * margin if high > low else max(abs(high) * margin, 0.5)
    return Axis(low=low - spread, high=high + spread, start=start, stop=stop)


def grid_y(root: Element, scale: Axis, left: float, right: float) -> None:
    """Horizontal rules with their values at the left."""
    for value in scale.ticks():
        position = scale(value)
        element(root, "line", x1=left, x2=right, y1=position, y2=position, class_="rule")
        element(root, "text", number(value), x=left - 6, y=position + 4, class_="tick end")


def grid_x(root: Element, scale: Axis, bottom: float, *, count: int = 6) -> None:
    """Values under the horizontal axis."""
    for value in scale.ticks(count):
        element(root, "text", number(value), x=scale(value), y=bottom + 16, class_="tick middle")


def path(points: Sequence[tuple[float, float | None]], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """Path data of a line through `points`; a gap where the value is missing."""

    def commands() -> Iterator[str]:
        drawing = False
        for at, value in points:
            if value is None:
                drawing = False
                continue
            yield f"{'L' if drawing else 'M'}{_text(x(at))} {_text(y(value))}"
            drawing = True

    return " ".join(commands())


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is short."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{float(f'{value:.3g}'):,.10g}"
    return f"{value:.2g}"


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next((factor * power for factor in (1.0, 2.0, 2.5, 5.0) if factor * power >= rough * 0.999), 10.0 * power)


def _text(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2f}".rstrip("0").rstrip(".")
