"""Pictures for side-by-side comparison in a page: one PNG a network, the same noise in each column."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from qdiff_fx.errors import InputError
from qdiff_fx.report.page import Strip
from qdiff_fx.report.pictures import GAP, LabelledRow, image_strip
from qdiff_fx.safe_io import path_inside, replacing


def save_strips(folder: Path, rows: Sequence[LabelledRow], columns: int = 10) -> list[dict[str, Any]]:
    """Write each row's images to `folder`, the reference first; returns what a run's document says of them."""
    written = []
    for index, row in enumerate(rows):
        name = f"samples-{index}.png"
        with replacing(folder / name) as partial:
            _transparent_gaps(image_strip(row.images, columns), row.images.shape[-1], row.images.shape[-2]).save(
                partial, format="PNG"
            )
        written.append(
            {
                "title": row.title,
                "detail": row.detail,
                "file": name,
                "columns": min(columns, len(row.images)),
                "size": [int(row.images.shape[-1]), int(row.images.shape[-2])],
            }
        )
    return written


def save_samples(folder: Path, images: Mapping[str, Tensor], count: int = 10) -> list[dict[str, Any]]:
    """The first `count` pictures of each network, the reference first, as `save_strips` writes them; [] for latents.

    Args:
      images: [B, C, H, W] in [-1, 1] by title.
    """
    if any(item.shape[1] not in (1, 3) for item in images.values()):
        return []
    rows = [LabelledRow(title=title, detail="", images=(item[:count] + 1) / 2) for title, item in images.items()]
    return save_strips(folder, rows)


def read_strips(samples: Sequence[Mapping[str, Any]], folder: Path) -> tuple[Strip, ...]:
    """What `save_strips` wrote, as a page holds it. Raises InputError if a file is missing."""
    strips = []
    for sample in samples:
        path = path_inside(folder, str(sample["file"]))
        source, width, height = _read_picture(path)
        strips.append(
            Strip(
                title=str(sample["title"]),
                detail=str(sample["detail"]),
                source=source,
                width=width,
                height=height,
                period=100.0 * (int(sample["size"][0]) + GAP) / width,
            )
        )
    return tuple(strips)


def _transparent_gaps(strip: np.ndarray[Any, np.dtype[np.uint8]], width: int, height: int) -> Image.Image:
    """The strip as a picture whose gaps show the page behind, light or dark."""
    rows = np.arange(strip.shape[0]) % (height + GAP) < height
    columns = np.arange(strip.shape[1]) % (width + GAP) < width
    alpha = np.where(rows[:, None] & columns[None, :], 255, 0).astype(np.uint8)
    return Image.fromarray(np.dstack([strip, alpha]))


def _read_picture(path: Path) -> tuple[str, int, int]:
    """A PNG as a data: address, its width and height. Raises InputError if it cannot be read."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
            width, height = picture.size
    except OSError as error:
        raise InputError(
            f"{path}: a picture of the run cannot be read ({error.strerror or error}); run it again"
        ) from error
    return f"data:image/png;base64,{base64.b64encode(content).decode()}", width, height
