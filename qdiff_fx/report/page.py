"""What a report's page is made of. The template knows these and nothing of any run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

Level = Literal["warning", "note"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """A headline figure."""

    label: str
    value: str
    unit: str = ""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Something that a reader should know, and what to do about it.

    Args:
      level: "warning" where the result may be of no use, "note" for what is good to know.
      remedy: what to do; "" where nothing needs doing.
    """

    level: Level
    text: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A table's column; `numeric` ones are flush right."""

    title: str
    numeric: bool = False


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A table's cell.

    Args:
      text: what is shown.
      value: what it is sorted by; None sorts by the text.
      code: whether it is a name.
    """

    text: str
    value: float | None = None
    code: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """A table's row.

    Args:
      facets: what filters choose by, in the order of the table's filters.
      block: index of the block it belongs to.
      strong: whether it stands out.
    """

    cells: tuple[Cell, ...]
    facets: tuple[str, ...] = ()
    block: int | None = None
    strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that sorts by every column; long ones also filter.

    Args:
      filters: titles of the choices; each row has a facet for each.
    """

    id: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    filters: tuple[str, ...] = ()

    @property
    def long(self) -> bool:
        """Whether it scrolls in a panel of its own, with a search field."""
        return len(self.rows) > _LONG

    def options(self, index: int) -> tuple[str, ...]:
        """What the filter at `index` lets choose from, in the order of the rows."""
        return tuple(dict.fromkeys(row.facets[index] for row in self.rows))


_LONG = 14


@dataclass(frozen=True, kw_only=True)
class Key:
    """An entry of a chart's legend."""

    label: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure with its title and legend."""

    title: str
    figure: Markup
    keys: tuple[Key, ...] = ()
    wide: bool = False
    small: tuple[Markup, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A network's pictures in one row of images, the same noise in each column as in every other strip.

    Args:
      source: a data: address of the PNG.
      width, height: of the PNG, in pixels.
      period: share of the width from one picture's left edge to the next one's, in percent.
    """

    title: str
    detail: str
    source: str
    width: int
    height: int
    period: float


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with what stands under it: pictures, charts, then a table."""

    id: str
    title: str
    note: str = ""
    strips: tuple[Strip, ...] = ()
    charts: tuple[Chart, ...] = ()
    table: Table | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not self.strips and not self.charts and (self.table is None or not self.table.rows)


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    footer: str
    cards: tuple[Card, ...] = ()
    advice: tuple[Advice, ...] = ()
    sections: tuple[Section, ...] = ()


def cell(value: Any, *, code: bool = False) -> Cell:
    """A cell of any JSON value: numbers with four digits, "–" for None, lists by their length."""
    if value is None:
        return Cell(text="–")
    if isinstance(value, bool):
        return Cell(text="yes" if value else "no")
    if isinstance(value, int):
        return Cell(text=f"{value:,}", value=float(value))
    if isinstance(value, float):
        return Cell(text=f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}", value=value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        short = all(isinstance(item, (str, int)) for item in value) and len(value) <= 3
        return Cell(text=", ".join(map(str, value)) if short else f"{len(value)} values", value=float(len(value)))
    return Cell(text=str(value), code=code)
