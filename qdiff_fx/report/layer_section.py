"""What every layer became, and the graph of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdiff_fx.report.block_figure import block_errors, block_figure, decibels_alone
from qdiff_fx.report.page import Cell, Chart, Column, Row, Section, Table, cell

_CARRIER = 32
"""What a missing width sorts as."""


def blocks_section(run: Mapping[str, Any]) -> Section:
    """The graph of blocks, coloured by the predicted error of each."""
    graph, layers = run.get("graph") or {}, run.get("layers") or ()
    blocks = graph.get("blocks") or ()
    errors = block_errors(blocks, layers)
    known = [value for value in (decibels_alone(error) for error in errors.values()) if value is not None]
    colours = (
        f"Coloured by what quantizing the block alone costs, from {max(known):.0f} dB of output SQNR (pale) to "
        f"{min(known):.0f} dB (strong), as predicted for the widths that were chosen."
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
    layers = run.get("layers") or ()
    columns = (
        Column(title="#", numeric=True),
        Column(title="layer"),
        Column(title="block", numeric=True),
        Column(title="W bits", numeric=True),
        Column(title="A bits", numeric=True),
        Column(title="alone [dB]", numeric=True),
        Column(title="bytes", numeric=True),
        Column(title="was", numeric=True),
        Column(title="kernel"),
        Column(title="why"),
    )
    rows = tuple(_row(index, layer) for index, layer in enumerate(layers, start=1))
    return Section(
        id="layers",
        title="Layers",
        note="What every layer became. Alone: predicted output SQNR if only this layer were quantized; the lower, the "
        "more sensitive. A column's head sorts.",
        table=Table(id="layer-table", columns=columns, rows=rows, filters=("weights", "runs as", "integers")),
    )


def _row(index: int, layer: Mapping[str, Any]) -> Row:
    alone = decibels_alone(layer.get("error"))
    fallback, reason = str(layer.get("fallback") or ""), str(layer.get("reason") or "")
    return Row(
        cells=(
            cell(index),
            Cell(text=str(layer["name"]), code=True),
            cell(layer.get("block")),
            _bits(layer.get("weight_bits")),
            _bits(layer.get("activation_bits")),
            Cell(text="–" if alone is None else f"{alone:.1f}", value=1e9 if alone is None else alone),
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
