"""The page of a benchmark's JSON: every list or mapping of like records becomes a table that sorts and filters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qdiff_fx.report.charts import Bar, BarGroup, bar_chart
from qdiff_fx.report.page import Card, Chart, Column, Page, Row, Section, Table, cell

_TIMES: Mapping[str, str] = {"milliseconds": "ms", "ms": "ms", "seconds_per_step": "s", "median_ms": "ms"}
"""Fields that hold the time of a step, and their units."""

_DEEPEST = 5


def benchmark_page(document: Mapping[str, Any], name: str) -> Page:
    """A page of all records in `document`, the times also as bars."""
    sections, cards = [], []
    for index, (path, complete) in enumerate(_record_sets(document, ())):
        title = " · ".join(path) or name
        records, shared = _without_shared(complete)
        section = Section(
            id=f"records-{index}",
            title=title,
            note="; ".join(text for text in (_scalars_beside(document, path), shared) if text),
            charts=tuple(_time_chart(records)),
            table=_table(f"table-{index}", records),
        )
        cards += list(_speed_card(title, records))
        sections.append(section)
    return Page(
        title=name,
        subtitle=" · ".join(f"{key} {value}" for key, value in _flat(document.get("machine") or {}).items()),
        footer=f"Drawn from {name}.",
        cards=tuple(cards[:6]),
        sections=tuple(section for section in sections if not section.empty),
    )


def _record_sets(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    """(path, records) of every list of mappings and every mapping of like mappings, outermost first."""
    if len(path) > _DEEPEST:
        return
    if isinstance(value, Mapping):
        if _are_records(list(value.values())):
            yield path, [{"name": key, **_flat(item)} for key, item in value.items()]
            return
        for key, item in value.items():
            yield from _record_sets(item, (*path, str(key)))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        yield path, [_flat(item) for item in value]


def _are_records(items: Sequence[Any]) -> bool:
    """Whether all are mappings with the same few fields, at least one of them a plain value."""
    if len(items) < 2 or not all(isinstance(item, Mapping) and item for item in items):
        return False
    shared = set(items[0]).intersection(*items[1:])
    nested = all(isinstance(value, (Mapping, list)) for item in items for value in item.values())
    arms = any(_are_records(list(value.values())) for value in items[0].values() if isinstance(value, Mapping))
    return bool(shared) and not nested and not arms


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted fields."""
    result: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + str(key)] = value
    return result


def _without_shared(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Records without the fields that are equal in all of them, and those fields as text."""
    first = records[0]
    shared = [
        field
        for field, value in first.items()
        if len(records) > 1 and all(field in record and record[field] == value for record in records)
    ]
    text = ", ".join(f"{_title(field)} {cell(first[field]).text}" for field in shared)
    rest = [{field: value for field, value in record.items() if field not in shared} for record in records]
    return (rest, f"the same in all rows: {text}") if text and all(rest) else (records, "")


def _title(field: str) -> str:
    return re.sub(r"[_.]", " ", field)


def _table(identity: str, records: Sequence[Mapping[str, Any]]) -> Table:
    fields = list(dict.fromkeys(field for record in records for field in record))
    numeric = {
        field: all(isinstance(record.get(field), (int, float, type(None))) for record in records) for field in fields
    }
    columns = tuple(Column(title=_title(field), numeric=numeric[field]) for field in fields)
    rows = tuple(Row(cells=tuple(cell(record.get(field)) for field in fields)) for record in records)
    return Table(id=identity, columns=columns, rows=rows)


def _time_chart(records: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    field = _time_field(records)
    if field is None:
        return
    groups = [
        BarGroup(
            label=_label(record),
            note=f"{record[field]:.4g} {_TIMES[field]}",
            bars=(
                Bar(
                    low=0.0,
                    high=float(record[field]),
                    colour="reference" if "compile" in _label(record) else "ours",
                    tip=f"{record[field]:.4g} {_TIMES[field]}",
                ),
            ),
        )
        for record in records
    ]
    yield Chart(title="Time of a step", figure=bar_chart(groups, x_label="time of a step", unit=_TIMES[field]))


def _speed_card(title: str, records: Sequence[Mapping[str, Any]]) -> Iterator[Card]:
    field = _time_field(records)
    if field is None or len(records) < 2:
        return
    fastest, slowest = (pick(records, key=lambda record: float(record[field])) for pick in (min, max))
    yield Card(
        label=title.removesuffix(" · arms"),
        value=f"{float(slowest[field]) / float(fastest[field]):.1f}×",
        unit="fastest against slowest",
        detail=f"{_label(fastest)}: {fastest[field]:.4g} {_TIMES[field]}; {_label(slowest)}: {slowest[field]:.4g}",
    )


def _time_field(records: Sequence[Mapping[str, Any]]) -> str | None:
    usable = (int, float)
    return next((field for field in _TIMES if all(isinstance(record.get(field), usable) for record in records)), None)


def _label(record: Mapping[str, Any]) -> str:
    return str(record.get("name") or record.get("arm") or next(iter(record.values())))


def _scalars_beside(document: Any, path: Sequence[str]) -> str:
    """Plain values that stand beside the records: batch, threads, instruction set."""
    for key in path[:-1]:
        document = document[key]
    if not isinstance(document, Mapping):
        return ""
    plain = {key: value for key, value in document.items() if not isinstance(value, (Mapping, list))}
    return ", ".join(f"{key} {cell(value).text}" for key, value in plain.items())
