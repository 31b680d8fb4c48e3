"""Reading Fashion-MNIST's IDX files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from qdiff_fx.errors import InputError
from qdiff_fx.evaluation.fashion_mnist import read_fashion_mnist


def write(folder: Path, images: int, labels: int, *, magic: int = 2051, pixels: bytes | None = None) -> None:
    pixels = bytes(range(256)) * 4 if pixels is None else pixels
    content = struct.pack(">4I", magic, images, 28, 28) + (pixels * images)[: images * 784]
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(struct.pack(">2I", 2049, labels) + bytes(range(labels)))
    )


def test_pixels_map_to_minus_one_to_one_and_labels_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 3, 3)
    images, labels = read_fashion_mnist(tmp_path, "test")
    assert images.shape == (3, 1, 28, 28)
    assert images.dtype == torch.float32
    assert images[0, 0, 0, 0] == -1
    assert images.flatten()[255] == 1
    assert labels.tolist() == [0, 1, 2]


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dataset-fashion-mnist"):
        read_fashion_mnist(tmp_path, "train")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 3, 3, magic=2049)
    with pytest.raises(InputError, match="magic number 2049, want 2051"):
        read_fashion_mnist(tmp_path, "test")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 3, 3, pixels=b"\0")
    with pytest.raises(InputError, match="3 bytes of data, want 2352"):
        read_fashion_mnist(tmp_path, "test")


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 3, 2)
    with pytest.raises(InputError, match="3 test images but 2 labels"):
        read_fashion_mnist(tmp_path, "test")
