"""Pictures that people compare: one row a network, the same noise in each column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from qdiff_fx.errors import InputError
from qdiff_fx.report.plots import INK, MUTED, clean_axes, save_figure
from qdiff_fx.safe_io import replacing

GAP = 2
"""Pixels between two images."""


@dataclass(frozen=True, kw_only=True)
class LabelledRow:
    """One row of a comparison.

    Args:
      title, detail: what is written left of it; `detail` in a lighter colour.
      images: [B, C, H, W] in [0, 1], C of 1 or 3.
    """

    title: str
    detail: str
    images: Tensor


def image_strip(images: Tensor, columns: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """`images` [B, C, H, W] in [0, 1] as one picture of rows of `columns`, [H', W', 3] bytes on white.

    Raises: InputError unless there are 1 or 3 channels and at least one image.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise InputError(f"images of shape {list(images.shape)}: want [B, 1 or 3, H, W]; latents are no pictures")
    count, _, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = torch.ones(3, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    for index, image in enumerate(images.detach().float().clamp(0, 1)):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        canvas[:, top : top + height, left : left + width] = image
    return (canvas.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def save_grid(path: Path, images: Tensor, *, columns: int = 8, zoom: int = 4) -> None:
    """Write `images` [B, C, H, W] in [0, 1] as one PNG, each pixel `zoom` wide."""
    strip = Image.fromarray(image_strip(images, columns))
    with replacing(path) as partial:
        strip.resize((strip.width * zoom, strip.height * zoom), Image.Resampling.NEAREST).save(partial, format="PNG")


def save_comparison(path: Path, rows: Sequence[LabelledRow]) -> None:
    """Write the labelled rows, one above the other, as one PNG."""
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        columns = max(len(row.images) for row in rows)
        strips = [image_strip(row.images, columns) for row in rows]
        label_width, strip_width = 2.25, 0.62 * columns
        heights = [strip_width * strip.shape[0] / strip.shape[1] for strip in strips]
        figure = Figure(figsize=(label_width + strip_width, sum(heights) + 0.1 * len(rows)))
        total_width, total_height = figure.get_size_inches()
        top = float(total_height)
        for row, strip, height in zip(rows, strips, heights, strict=True):
            top -= height + 0.05
            frame = (label_width / total_width, top / total_height, strip_width / total_width, height / total_height)
            axes = figure.add_axes(frame)
            axes.imshow(strip, interpolation="nearest", aspect="auto")
            clean_axes(axes)
            middle = (top + height / 2) / total_height
            left = 0.1 / total_width
            figure.text(left, middle, row.title, va="bottom", fontsize=11, fontweight="bold", color=INK)
            figure.text(left, middle - 0.03 / total_height, row.detail, va="top", fontsize=8.5, color=MUTED)
            top -= 0.05
        save_figure(figure, path)
