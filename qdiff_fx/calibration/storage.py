"""A calibration set's folder: index.json and the safetensors shards that it lists with their SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qdiff_fx.calibration.call_form import CallForm
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.calibration.shard import Shard, pack_rows
from qdiff_fx.errors import CheckpointError, InputError
from qdiff_fx.safe_io import (
    digest_field,
    json_field,
    path_inside,
    read_json,
    remove_partial_files,
    tensor_bytes,
    write_json,
    write_tensors,
)

FORMAT = "qdiff_fx calibration set"
FORMAT_VERSION = 1
INDEX = "index.json"
SHARD_BYTES = 64 * 2**20
"""Bytes of rows that a written shard holds about."""

_SHARD_PATTERN = "rows-*.safetensors"


@dataclass(frozen=True, kw_only=True)
class Index:
    """What index.json says.

    Args:
      metadata: how the data came about, for people and for checks.
      shards: in row order.
      request: everything that decides the content of a collection, to resume it; None for recordings.
      complete: false while a collection runs.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    shards: Sequence[Shard] = ()
    request: Mapping[str, Any] | None = None
    complete: bool = True


def make_shard(
    form: CallForm, timesteps: torch.Tensor, leaves: Sequence[Iterable[torch.Tensor]], folder: Path | None = None
) -> Shard:
    """A shard of these rows (see `pack_rows`), in memory or, with `folder`, in a file named after its content."""
    tensors = pack_rows(form, timesteps, leaves)
    if folder is None:
        return Shard(form, len(timesteps), tensors=tensors)
    content = hashlib.sha256(tensor_bytes(tensors["digest"])).hexdigest()
    path = folder / f"rows-{content[:16]}.safetensors"
    return Shard(form, len(timesteps), path=path, digest=write_tensors(path, tensors))


def write_index(folder: Path, index: Index) -> None:
    """Make `index` the content of `folder`; its shards are written there already."""
    forms = list(dict.fromkeys(shard.form.digest for shard in index.shards))
    by_digest = {shard.form.digest: shard.form for shard in index.shards}
    shards = []
    for shard in index.shards:
        assert shard.path is not None and shard.digest is not None and shard.path.parent == folder
        number = forms.index(shard.form.digest)
        shards.append({"file": shard.path.name, "form": number, "rows": shard.rows, "sha256": shard.digest})
    write_json(
        folder / INDEX,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "complete": index.complete,
            "metadata": dict(index.metadata),
            "request": index.request,
            "forms": [by_digest[digest].to_dict() for digest in forms],
            "shards": shards,
        },
    )


def read_index(folder: Path, *, verify: bool, progress: bool | None = False) -> Index:
    """The index of `folder` with its shards opened lazily.

    Args:
      folder: what `write_index` wrote.
      verify: read every shard through and compare its SHA-256; shapes and dtypes are compared always.
      progress: show a bar; None does so on a terminal.

    Raises: CheckpointError naming the file and what is wrong with it.
    """
    path = folder / INDEX
    data = read_json(path)
    if json_field(data, "format", str, path) != FORMAT:
        raise CheckpointError(f"{path}: format={data['format']!r:.60}, want {FORMAT!r}; not a calibration set")
    version = json_field(data, "format_version", int, path)
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version={version}, want {FORMAT_VERSION}; use the version that wrote it")
    forms = [CallForm.from_dict(_object(form, path), str(path)) for form in json_field(data, "forms", list, path)]
    shards = []
    for entry in json_field(data, "shards", list, path):
        values = _object(entry, path)
        number = json_field(values, "form", int, path)
        if number not in range(len(forms)):
            raise CheckpointError(f"{path}: form={number}, want 0..{len(forms) - 1}; edited, write it again")
        file = path_inside(folder, json_field(values, "file", str, path))
        rows = json_field(values, "rows", int, path)
        shards.append(Shard(forms[number], rows, path=file, digest=digest_field(values, "sha256", path)))
    with progress_bar("verify", total=len(shards), progress=progress, unit="file") as bar:
        for shard in shards:
            shard.check(content=verify)
            bar.update(1)
    return Index(
        metadata=json_field(data, "metadata", dict, path),
        shards=tuple(shards),
        request=None if data.get("request") is None else json_field(data, "request", dict, path),
        complete=json_field(data, "complete", bool, path),
    )


def check_free(folder: Path) -> None:
    """Raise InputError if `folder` exists and holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"path={folder}: holds something already; choose an empty or a new folder")


def remove_unlisted(folder: Path, index: Index) -> None:
    """Delete shards that `index` does not list, and what killed writers left."""
    remove_partial_files(folder)
    listed = {shard.path for shard in index.shards}
    for path in folder.glob(_SHARD_PATTERN):
        if path not in listed:
            path.unlink()


def _object(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {value!r:.60}, want an object; edited, write it again")
    return value
