"""The page of a demo, quantize or evaluate run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qdiff_fx.calibration.channels import channel_cells
from qdiff_fx.report.advice import advice
from qdiff_fx.report.cards import cards
from qdiff_fx.report.evaluation_sections import evaluation_sections
from qdiff_fx.report.layer_section import blocks_section, layers_section
from qdiff_fx.report.page import Cell, Column, Page, Row, Section, Table, cell
from qdiff_fx.report.run_charts import (
    activation_charts,
    error_growth_chart,
    reconstruction_chart,
    shortcut_chart,
    sqnr_chart,
)
from qdiff_fx.report.strips import read_strips
from qdiff_fx.report.tables import decibels, percent


def run_page(run: Mapping[str, Any], folder: Path) -> Page:
    """The page of `run`, whose pictures lie in `folder`; what the run has no figures for is left out."""
    sections = (
        Section(
            id="samples",
            title="Samples",
            note="The same noise in each column; the integer models run in an unmodified sampler.",
            strips=read_strips(run.get("samples") or (), folder),
        ),
        Section(id="quality", title="Quality", note=_quality_note(run), table=_quality_table(run)),
        Section(
            id="error",
            title="Where the error grows",
            note="How far the sample has drifted from the full-precision one after each step, and the network's own "
            "error at each noise level.",
            charts=tuple(chart for chart in (error_growth_chart(run), sqnr_chart(run)) if chart),
        ),
        Section(
            id="size",
            title="Size of the weights",
            note="All that is stored: packed codes, scales, zero points, biases and what stays in floating point.",
            table=_size_table(run.get("sizes") or {}),
        ),
        *evaluation_sections(run),
        blocks_section(run),
        layers_section(run),
        Section(
            id="raises",
            title="Raised above the preset",
            note="Quantizers that cause most of the error got more bits, within the slack that the config allows.",
            table=_raise_table(run.get("raises") or ()),
        ),
        Section(
            id="ranges",
            title="What the quantizers see",
            note="Ranges of the operands of each shortcut that is split: splitting pays where they differ. The "
            "activations whose range changes most over the timesteps; dotted, what the grid of their one static "
            "quantizer covers.",
            charts=tuple(chart for chart in (shortcut_chart(run), activation_charts(run)) if chart),
        ),
        Section(
            id="channels",
            title="Channel outliers",
            note="The layer inputs whose channels differ most: largest channel range over the median one, as the grid "
            "would see it without factors and as it sees it with them. Factors cost nothing at run time; they are kept "
            "where they lower the layer's error.",
            table=_channel_table(run.get("channels") or ()),
        ),
        Section(
            id="reconstruction",
            title="Learned rounding",
            note="Error of each block's output before and after its rounding and step sizes were learned.",
            charts=tuple(chart for chart in (reconstruction_chart(run),) if chart),
        ),
    )
    model = run.get("model") or {}
    return Page(
        title=f"{model.get('name', 'a network')} on integers",
        subtitle=" · ".join(_subtitle(run)),
        footer=_footer(run),
        cards=cards(run),
        advice=advice(run),
        sections=tuple(section for section in sections if not section.empty),
    )


def _subtitle(run: Mapping[str, Any]) -> Iterator[str]:
    model, machine, settings = (run.get(name) or {} for name in ("model", "machine", "settings"))
    if "parameters" in model:
        yield f"{model['parameters']:,} parameters"
    if model.get("preset"):
        yield str(model["preset"]).upper()
    if "steps" in settings:
        yield f"{settings['steps']} sampling steps"
    if "processor" in machine:
        yield f"{machine['processor']} ({machine['threads']} threads, {machine['isa']})"
        yield f"torch {machine['torch']}"


def _footer(run: Mapping[str, Any]) -> str:
    settings, seconds = run.get("settings") or {}, run.get("total_seconds")
    text = f"Made by qdiff-fx {run.get('kind', '')}" + (f" in {seconds:.0f} s" if seconds else "")
    if "calibration_rows" in settings:
        text += (
            f"; calibrated on {settings['calibration_rows']:,} inputs of {settings['calibration_timesteps']} timesteps "
            f"(seed {settings['calibration_seed']}), measured from noise of seed {settings['evaluation_seed']}, "
            f"backend {settings['backend']}"
        )
    elif run.get("calibration"):
        calibration = run["calibration"]
        text += (
            f"; calibrated on {calibration.get('rows')} inputs of {len(calibration.get('timesteps') or ())} timesteps"
        )
    return text + "."


def _quality_note(run: Mapping[str, Any]) -> str:
    settings, reference = run.get("settings") or {}, run.get("reference") or {}
    if not run.get("table"):
        return ""
    text = (
        f"Against full precision, higher is better. Output SQNR compares the network's outputs on "
        f"{settings.get('heldout_rows')} held-out inputs at {settings.get('heldout_timesteps')} timesteps, pooled and "
        f"in the median over timesteps; end-point PSNR compares the pictures of {settings.get('samples')} trajectories "
        f"from the same noise (median). Weight errors add up over a trajectory and activation errors average out, so "
        f"the yardsticks may disagree."
    )
    if reference.get("confident_share") is not None:
        text += (
            " Confident: share of the pictures that a small classifier puts into one class with more than 90 % "
            f"probability ({percent(reference['confident_share'])} in full precision)."
        )
    if run.get("integer_sqnr_pooled_db") is not None:
        text += (
            f" The simpler arms are simulated on the same graph; pooled SQNR of our W4A8 on integers: "
            f"{decibels(run['integer_sqnr_pooled_db'])} dB."
        )
    return text


def _quality_table(run: Mapping[str, Any]) -> Table:
    columns = (
        Column(title="arm"),
        Column(title="preset"),
        Column(title="output SQNR pooled [dB]", numeric=True),
        Column(title="median over timesteps [dB]", numeric=True),
        Column(title="end-point PSNR [dB]", numeric=True),
        Column(title="confident", numeric=True),
    )
    rows = tuple(
        Row(
            cells=(
                Cell(text=str(row["title"])),
                Cell(text=str(row["preset"]).upper()),
                *(
                    Cell(text=decibels(row[name]), value=1e9 if row[name] is None else row[name])
                    for name in ("sqnr_pooled_db", "sqnr_median_db", "psnr_median_db")
                ),
                Cell(text=percent(row.get("confident_share")), value=row.get("confident_share")),
            ),
            strong=row["arm"] == "ours",
        )
        for row in run.get("table") or ()
    )
    return Table(id="quality-table", columns=columns, rows=rows)


def _size_table(sizes: Mapping[str, int]) -> Table:
    full = sizes.get("fp32")
    columns = (Column(title="stored as"), Column(title="bytes", numeric=True), Column(title="of FP32", numeric=True))
    rows = tuple(
        Row(
            cells=(
                Cell(text=name.upper()),
                cell(count),
                Cell(text=f"{count / full:.3f}", value=count / full) if full else Cell(text="–"),
            ),
            strong=not name.startswith("fp"),
        )
        for name, count in sorted(sizes.items(), key=lambda item: -item[1])
    )
    return Table(id="size-table", columns=columns, rows=rows)


def _raise_table(raises: Sequence[Mapping[str, Any]]) -> Table:
    columns = (Column(title="layers"), Column(title="what"), Column(title="bits", numeric=True), Column(title="why"))
    rows = tuple(
        Row(
            cells=(
                Cell(text=", ".join(row["layers"]), code=True),
                Cell(text=str(row["kind"])),
                Cell(text="carrier" if row["bits"] is None else str(row["bits"]), value=row["bits"] or 32),
                Cell(text=str(row["reason"])),
            )
        )
        for row in raises
    )
    return Table(id="raise-table", columns=columns, rows=rows)


def _channel_table(channels: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column(title="input of"),
        Column(title="before", numeric=True),
        Column(title="after", numeric=True),
        Column(title="factor"),
        Column(title="layer error [dB]", numeric=True),
    )

    def cells(row: Mapping[str, Any]) -> tuple[Cell, ...]:
        before, after, factor, gain = channel_cells(row)
        return (
            Cell(text=str(row["layer"]), code=True),
            Cell(text=before, value=row["spread"]),
            Cell(text=after, value=row["spread_after"]),
            Cell(text=factor),
            Cell(text=gain, value=-row["gain_db"]),
        )

    return Table(id="channel-table", columns=columns, rows=tuple(Row(cells=cells(row)) for row in channels))
