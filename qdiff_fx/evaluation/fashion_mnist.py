"""Reads Fashion-MNIST's own files (Zalando Research, MIT licence; Debian package `dataset-fashion-mnist`)."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qdiff_fx.errors import InputError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's `dataset-fashion-mnist` puts the four files."""

_IMAGES_MAGIC, _LABELS_MAGIC = 2051, 2049


def read_fashion_mnist(folder: Path, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28], fp32 in [-1, 1], and labels [N], int64 in 0..9.

    Args:
      folder: holds the four *-ubyte.gz files under their published names.
      split: "train" (60,000 images) or "test" (10,000).

    Raises: InputError if a file is missing, or is not the IDX file that it should be.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", _IMAGES_MAGIC).reshape(-1, 1, 28, 28)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", _LABELS_MAGIC)
    if len(images) != len(labels):
        raise InputError(f"{folder}: {len(images)} {split} images but {len(labels)} labels; download the files again")
    return torch.from_numpy(images.astype(np.float32) / 127.5 - 1), torch.from_numpy(labels.astype(np.int64))


def _read_idx(path: Path, magic: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The bytes of an IDX file in its own shape: a big-endian magic number, each dimension, the data."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; install Debian's dataset-fashion-mnist, or name the folder that has it"
        )
    content = gzip.decompress(path.read_bytes())
    if int.from_bytes(content[:4], "big") != magic:
        raise InputError(f"{path}: magic number {int.from_bytes(content[:4], 'big')}, want {magic}; not an IDX file")
    dimensions = magic & 0xFF
    header = np.frombuffer(content, ">u4", count=dimensions, offset=4)
    data = np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions))
    if data.size != int(np.prod(header)):
        raise InputError(f"{path}: {data.size} bytes of data, want {int(np.prod(header))}; download the file again")
    return data.reshape(header)
