"""The graph of blocks, coloured by what quantizing them costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from markupsafe import Markup

from qdiff_fx.report.svg import canvas, element, markup, tip

_STEP, _BOX, _LEVEL, _MARGIN = 30.0, 20.0, 46.0, 26.0


def block_errors(blocks: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Predicted error of each block, by index: the sum over its layers; blocks without any are left out."""
    by_layer = {row["name"]: row["error"] for row in layers if row.get("error") is not None}
    sums = {block["index"]: [by_layer[name] for name in block["layers"] if name in by_layer] for block in blocks}
    return {index: math.fsum(errors) for index, errors in sums.items() if errors}


def decibels_alone(error: float | None) -> float | None:
    """SQNR of the output if only this were quantized; None for no error or an unknown one."""
    return -10.0 * math.log10(error) if error is not None and error > 0 else None


def block_figure(
    blocks: Sequence[Mapping[str, Any]], edges: Sequence[Sequence[int]], errors: Mapping[int, float]
) -> Markup:
    """Blocks from left to right in execution order, lower the coarser their resolution.

    Args:
      blocks, edges: as in `block_graph`.
      errors: predicted relative error by block index. The colour is even in decibels, from the least sensitive block
        (pale) to the most (strong).
    """
    lowest = max((int(block["level"]) for block in blocks), default=0)
    width = 2 * _MARGIN + _STEP * max(0, len(blocks) - 1)
    root = canvas(width, 2 * _MARGIN + _LEVEL * lowest + 24, "graph of blocks", class_="chart blocks")
    root.set("width", f"{width:.0f}")
    where = {
        block["index"]: (_MARGIN + _STEP * position, _MARGIN + 8 + _LEVEL * int(block["level"]))
        for position, block in enumerate(blocks)
    }
    for source, target in edges:
        if source in where and target in where:
            _edge(root, where[source], where[target])
    known = [value for value in (decibels_alone(error) for error in errors.values()) if value is not None]
    for block in blocks:
        _block(root, block, where[block["index"]], errors.get(block["index"]), known, math.fsum(errors.values()))
    return markup(root)


def _edge(root: Element, start: tuple[float, float], end: tuple[float, float]) -> None:
    (x1, y1), (x2, y2) = start, end
    if abs(x2 - x1) <= _STEP * 1.5:
        element(root, "path", d=f"M{x1:.0f} {y1:.0f} L{x2:.0f} {y2:.0f}", class_="edge")
        return
    top = min(y1, y2) - _BOX / 2 - min(20.0, 6 + abs(x2 - x1) / 60)
    points = (
        f"M{x1:.0f} {y1 - _BOX / 2:.0f} C{x1 + 12:.0f} {top:.0f} {x2 - 12:.0f} {top:.0f} {x2:.0f} {y2 - _BOX / 2:.0f}"
    )
    element(root, "path", d=points, class_="edge skip")


def _block(
    root: Element,
    block: Mapping[str, Any],
    at: tuple[float, float],
    error: float | None,
    known: Sequence[float],
    total: float,
) -> None:
    x, y = at
    alone = decibels_alone(error)
    item = element(root, "a", class_="hit", href="#layers", data_block=str(block["index"]))
    _box(item, at, class_="block")
    if alone is not None:
        spread = max(known) - min(known)
        strength = (max(known) - alone) / spread if spread > 0 else 0.5
        _box(item, at, class_="heat").set("fill-opacity", f"{0.06 + 0.94 * strength:.3f}")
    element(item, "text", str(block["index"]), x=x, y=y + _BOX / 2 + 13, class_="tick middle")
    layers = block["layers"]
    lines = [f"block {block['index']}: {block['name']}", f"{len(layers)} layer{'' if len(layers) == 1 else 's'}"]
    if error is not None:
        shown = "∞" if alone is None else f"{alone:.1f}"
        share = f", {error / total:.1%} of all predicted error" if total > 0 else ""
        lines.append(f"quantized alone: {shown} dB{share}")
    tip(item, "\n".join(lines))


def _box(parent: Element, at: tuple[float, float], *, class_: str) -> Element:
    left, top = at[0] - _BOX / 2, at[1] - _BOX / 2
    return element(parent, "rect", x=left, y=top, width=_BOX, height=_BOX, rx=4, class_=class_)
