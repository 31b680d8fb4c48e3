"""Thousands of samples, chunk by chunk: what is finished stays on disk, so that a killed run continues."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.errors import CheckpointError, InputError, NonFiniteError
from qdiff_fx.safe_io import read_json, read_tensors, write_json, write_tensors

CHUNK = 250
_IDENTITY = "identity.json"


def chunk_noise(shape: tuple[int, ...], rows: int, seed: int, index: int) -> Tensor:
    """[rows, *shape] standard normal of chunk `index`: the same for every network, whatever was sampled before."""
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + index))


def sample_in_chunks(
    sample: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    *,
    count: int,
    seed: int,
    chunk: int = CHUNK,
    folder: Path | None = None,
    identity: str = "",
    progress: bool | None = None,
    description: str = "samples",
) -> Tensor:
    """`count` pictures [count, C, H, W], uint8 (pixel v stands for v / 127.5 - 1), from seeded noise.

    Args:
      sample: pictures [rows, C, H, W] in [-1, 1] (clamped) from noise [rows, C, H, W].
      shape: (C, H, W).
      count: at least 1; a larger count later continues where this one ended, if it is a multiple of `chunk`.
      seed: of the noise.
      chunk: pictures at a time.
      folder: where finished chunks are kept; None keeps nothing.
      identity: of network and sampler, such as a digest; a folder of another is refused.
      progress: show a bar with an ETA; None does so on a terminal.

    Raises: CheckpointError if `folder` holds another run's pictures; NonFiniteError if the sampler diverged.
    """
    if count < 1 or chunk < 1:
        raise InputError(f"count={count}, chunk={chunk}: want at least 1 of each")
    if folder is not None:
        _check_identity(folder, {"identity": identity, "seed": seed, "chunk": chunk, "shape": list(shape)})
    parts = []
    with progress_bar(description, total=count, progress=progress) as bar:
        for index, start in enumerate(range(0, count, chunk)):
            rows = min(chunk, count - start)
            path = None if folder is None else folder / f"chunk-{index:04d}.safetensors"
            known = path is not None and path.is_file() and len(images := read_tensors(path)["images"]) >= rows
            if not known:
                images = as_bytes(sample(chunk_noise(shape, rows, seed, index)))
                if path is not None:
                    write_tensors(path, {"images": images})
            parts.append(images[:rows])
            bar.update(rows)
    return torch.cat(parts)


def as_bytes(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] (clamped) as uint8. Raises NonFiniteError for NaN and infinity."""
    if not bool(images.isfinite().all()):
        raise NonFiniteError("samples hold NaN or infinity: want finite pixels; the sampler diverged")
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 pictures as fp32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def _check_identity(folder: Path, wanted: dict[str, object]) -> None:
    path = folder / _IDENTITY
    if not path.is_file():
        write_json(path, wanted)
    elif read_json(path) != wanted:
        raise CheckpointError(
            f"{folder}: holds samples of another network, sampler, seed or chunk size; name another folder or delete it"
        )
