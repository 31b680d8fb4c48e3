"""What `qdiff-fx evaluate` measures beyond the yardsticks: distributions, picture metrics, intervals, sensitivity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qdiff_fx.report.page import Cell, Column, Row, Section, Table, cell


def evaluation_sections(run: Mapping[str, Any]) -> Iterator[Section]:
    """The sections of an evaluation; those without figures come out empty."""
    found = run.get("distribution") or {}
    yield Section(
        id="distribution",
        title="Distance between distributions",
        note=_distribution_note(found),
        table=_distribution_table(found),
    )
    yield Section(
        id="intervals",
        title="Over the seeds",
        note="Means over the seeds of the noise, with 95 % intervals where there is more than one seed.",
        table=_interval_table(run.get("intervals") or {}),
    )
    ranking = run.get("sensitivity") or {}
    yield Section(
        id="sensitivity",
        title="Quantized alone",
        note=f"Output SQNR of the network if only this is quantized, on {ranking.get('samples')} held-out inputs; the "
        "lowest is the most sensitive.",
        table=_ranking_table("sensitivity-table", ranking.get("rows") or ()),
    )
    parts = run.get("parts") or {}
    yield Section(
        id="parts",
        title="Error at each part",
        note="SQNR of the output of every layer, attention and block with everything quantized, inputs included.",
        table=_ranking_table("part-table", parts.get("parts") or ()),
    )


def _distribution_note(found: Mapping[str, Any]) -> str:
    first = next((item["by_seed"][0] for item in found.values()), None)
    if first is None:
        return ""
    return (
        f"Frechet distance (lower is better) and score (higher is better) of {first['samples']:,} samples a seed, by "
        f"the features of {first['extractor']}, from {first['reference']} ({first['reference_samples']:,} images)."
    )


def _distribution_table(found: Mapping[str, Any]) -> Table:
    columns = (
        Column(title="network"),
        Column(title="Frechet distance", numeric=True),
        Column(title="score", numeric=True),
        Column(title="of full precision", numeric=True),
    )
    reference = (found.get("full precision") or {}).get("frechet", {}).get("mean")
    rows = []
    for name, item in found.items():
        ratio = item["frechet"]["mean"] / reference if reference else None
        rows.append(
            Row(
                cells=(
                    Cell(text=str(name)),
                    _interval_cell(item["frechet"]),
                    Cell(text="–") if item["score"] is None else _interval_cell(item["score"]),
                    Cell(text="–" if ratio is None else f"{ratio:.3f}×", value=ratio),
                ),
                strong=name != "full precision",
            )
        )
    return Table(id="distribution-table", columns=columns, rows=tuple(rows))


def _interval_table(intervals: Mapping[str, Any]) -> Table:
    columns = (Column(title="figure"), Column(title="mean", numeric=True), Column(title="95 % interval", numeric=True))
    rows = tuple(
        Row(cells=(Cell(text=str(name)), cell(item["mean"]), Cell(text=_bounds(item), value=item["low"])))
        for name, item in intervals.items()
    )
    return Table(id="interval-table", columns=columns, rows=rows)


def _ranking_table(identity: str, ranked: Any) -> Table:
    columns = (
        Column(title="kind"),
        Column(title="name"),
        Column(title="bits", numeric=True),
        Column(title="SQNR [dB]", numeric=True),
    )
    rows = tuple(
        Row(
            cells=(
                Cell(text=str(row["kind"])),
                Cell(text=str(row["name"]), code=True),
                cell(row.get("bits")),
                Cell(text="∞", value=1e9)
                if row["sqnr_db"] is None
                else Cell(text=f"{row['sqnr_db']:.1f}", value=row["sqnr_db"]),
            ),
            facets=(str(row["kind"]),),
        )
        for row in ranked
    )
    return Table(id=identity, columns=columns, rows=rows, filters=("kind",))


def _interval_cell(interval: Mapping[str, Any]) -> Cell:
    bounds = "" if interval["low"] is None else f" ({_bounds(interval)})"
    return Cell(text=f"{interval['mean']:.4g}{bounds}", value=interval["mean"])


def _bounds(interval: Mapping[str, Any]) -> str:
    return "–" if interval["low"] is None else f"{interval['low']:.4g} to {interval['high']:.4g}"
