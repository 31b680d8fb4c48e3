"""What every layer became, and the graph of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdiff_fx.report.block_figure import block_errors, block_figure, decibels_alone
from qdiff_fx.report.page import Cell, Chart, Column, Row, Section, Table, cell

_CARRIER = 32
"""What a missing width sorts as."""

_UNKNOWN = 1e9


def blocks_section(run: Mapping[str, Any]) -> Section:
    """The graph of blocks, coloured by the predicted error of each."""
    graph, layers = run.get("graph") or {}, known_layers(run)
    blocks = graph.get("blocks") or ()
    errors = block_errors(blocks, layers)
    known = [value for value in (decibels_alone(error) for error in errors.values()) if value is not None]
    colours = (
        f"Coloured by what quantizing the block alone costs, from {max(known):.0f} dB of output SQNR (pale) to "
        f"{min(known):.0f} dB (strong), {_source(run)}."
        if known
        else "This run left no prediction of the error by block."
    )
    figure = Chart(title="", figure=block_figure(blocks, graph.get("edges") or (), errors), wide=True)
    return Section(
        id="blocks",
        title="Blocks",
        note=f"{colours} Lower means coarser resolution; thin arcs are skip connections. Choose a block to see its "
        "layers.",
        charts=(figure,) if blocks else (),
    )


def layers_section(run: Mapping[str, Any]) -> Section:
    """The table of layers: sorts by every column, filters by text, width and kernel."""
    layers = known_layers(run)
    parts = any("output_db" in layer for layer in layers)
    columns = (
        Column(title="#", numeric=True),
        Column(title="layer"),
        Column(title="block", numeric=True),
        Column(title="W bits", numeric=True),
        Column(title="A bits", numeric=True),
        Column(title="alone [dB]", numeric=True),
        *((Column(title="output [dB]", numeric=True),) if parts else ()),
        Column(title="bytes", numeric=True),
        Column(title="was", numeric=True),
        Column(title="kernel"),
        Column(title="why"),
    )
    rows = tuple(_row(index, layer, parts=parts) for index, layer in enumerate(layers, start=1))
    return Section(
        id="layers",
        title="Layers",
        note=f"What every layer became. Alone: output SQNR of the network if only this layer is quantized, "
        f"{_source(run)}; the lower, the more sensitive."
        + (" Output: SQNR of the layer's own output with everything quantized." if parts else "")
        + " A column's head sorts.",
        table=Table(id="layer-table", columns=columns, rows=rows, filters=("weights", "runs as", "integers")),
    )


def known_layers(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of "layers", with what an evaluation measured of them: "error" alone, "output_db" with all quantized."""
    measured: dict[str, float] = {}
    for row in (run.get("sensitivity") or {}).get("rows") or ():
        if row["kind"] in ("weight", "input", "attention") and row["sqnr_db"] is not None:
            measured[row["name"]] = measured.get(row["name"], 0.0) + 10.0 ** (-row["sqnr_db"] / 10.0)
    outputs = {row["name"]: row["sqnr_db"] for row in (run.get("parts") or {}).get("parts") or ()}
    return [
        {
            **layer,
            **({"error": measured[layer["name"]]} if layer["name"] in measured else {}),
            **({"output_db": outputs.get(layer["name"])} if outputs else {}),
        }
        for layer in run.get("layers") or ()
    ]


def _source(run: Mapping[str, Any]) -> str:
    return (
        "as measured on held-out inputs" if run.get("sensitivity") else "as predicted for the widths that were chosen"
    )


def _decibel_cell(value: float | None) -> Cell:
    """A figure that sorts behind all others where it is not known."""
    return Cell(text="–" if value is None else f"{value:.1f}", value=_UNKNOWN if value is None else value)


def _row(index: int, layer: Mapping[str, Any], *, parts: bool) -> Row:
    fallback, reason = str(layer.get("fallback") or ""), str(layer.get("reason") or "")
    return Row(
        cells=(
            cell(index),
            Cell(text=str(layer["name"]), code=True),
            cell(layer.get("block")),
            _bits(layer.get("weight_bits")),
            _bits(layer.get("activation_bits")),
            _decibel_cell(decibels_alone(layer.get("error"))),
            *((_decibel_cell(layer.get("output_db")),) if parts else ()),
            cell(layer.get("bytes")),
            cell(layer.get("bytes_before")),
            Cell(text=str(layer["kernel"]), code=True),
            Cell(text="; ".join(item for item in (fallback, reason) if item)),
        ),
        facets=(
            f"{layer['weight_bits']} bits" if layer.get("weight_bits") else "carrier type",
            str(layer["kernel"]),
            "falls back" if fallback else "as planned",
        ),
        block=layer.get("block"),
    )


def _bits(bits: int | None) -> Cell:
    return Cell(text="–" if bits is None else str(bits), value=float(bits or _CARRIER))
