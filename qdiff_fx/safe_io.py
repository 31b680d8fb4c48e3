"""Files that are whole or absent: atomic writes, digests, and JSON and safetensors that are checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qdiff_fx.errors import CheckpointError, DiskError

_Kind = TypeVar("_Kind")

_PARTIAL_SUFFIX = ".partial"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; what is written there becomes `path` when the block ends well.

    On an error, a full disk included, the temporary file is deleted and the file that was at `path` stays as it was.

    Args:
      path: the file; its folder is made if needed.
      durable: wait until the disk has it, so that it survives a power cut; False for scratch files.

    Raises: DiskError if the folder or the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner can read
        if durable:
            _flush_to_disk(partial)
        os.replace(partial, path)
        if durable:
            _flush_to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise DiskError(
            f"{path}: cannot be written ({error}); nothing was replaced; free space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def remove_partial_files(folder: Path) -> None:
    """Delete what a killed writer left in `folder`; safe only while nobody else writes there."""
    for path in folder.glob(f".*{_PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """The SHA-256 of the file's bytes, in lower-case hexadecimal. Raises CheckpointError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); restore the file") from error


def check_digest(path: Path, expected: str) -> None:
    """Raise CheckpointError unless the file's SHA-256 is `expected`."""
    found = file_digest(path)
    if found != expected:
        raise CheckpointError(
            f"{path}: SHA-256 is {found[:12]}..., want {expected[:12]}...; truncated or edited, write it again"
        )


def write_bytes(path: Path, content: bytes) -> None:
    """Make `content` the file at `path`, atomically."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's values as raw bytes, row-major, for hashing; shares memory where it can."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def json_bytes(value: Any) -> bytes:
    """`value` as indented UTF-8 JSON with sorted keys: equal values give equal bytes. NaN and infinity are refused."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Make `value` the JSON file at `path`, atomically."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file.

    Raises: CheckpointError if the file is missing, is not UTF-8 JSON, repeats a key, holds NaN or infinity, is nested
      too deeply or is not an object.
    """
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); truncated or edited, write it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, want an object; write it again")
    return value


def json_field(values: Mapping[str, Any], key: str, kind: type[_Kind], source: str | Path) -> _Kind:
    """`values[key]`, which must be a `kind` (a bool is no int). Raises CheckpointError naming `source` and the key."""
    if key not in values:
        raise CheckpointError(f"{source}: field {key!r} is missing; truncated or edited, write it again")
    value = values[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"{source}: {key}={value!r:.60}, want {kind.__name__}; edited, write it again")
    return value


def digest_field(values: Mapping[str, Any], key: str, source: str | Path) -> str:
    """`values[key]`, which must be a SHA-256 in lower-case hexadecimal. Raises CheckpointError."""
    value = json_field(values, key, str, source)
    if not _DIGEST.fullmatch(value):
        raise CheckpointError(f"{source}: {key}={value!r:.60}, want 64 hexadecimal digits; edited, write it again")
    return value


def path_inside(folder: Path, name: str) -> Path:
    """`folder / name` for a plain relative name ("weights/part-1.safetensors") that stays inside `folder`.

    Raises: CheckpointError if the name is absolute, has "..", other than plain ASCII names, or leads out by a link.
    """
    if not all(_PLAIN_NAME.fullmatch(part) for part in name.split("/")):
        raise CheckpointError(
            f"{folder}: file name {name!r:.80}, want plain names inside the folder; edited, do not use"
        )
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{path}: leads out of {folder} by a link; copy the file into the folder")
    return path


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, durable: bool = True) -> str:
    """Make `tensors` the safetensors file at `path`, atomically; returns its SHA-256.

    Equal tensors give equal bytes: names are sorted and there is no metadata (its order is not defined).
    """
    contiguous = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with replacing(path, durable=durable) as partial:
        save_file(contiguous, partial)
        return file_digest(partial)


class TensorFile:
    """A safetensors file whose tensors are mapped into memory when asked for, not read when opened."""

    def __init__(self, path: Path) -> None:
        """Open `path`. Raises CheckpointError if it is missing, truncated or no safetensors file."""
        self.path = path
        try:
            self._file = cast(Any, safe_open(path, framework="pt", device="cpu"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be opened ({error}); truncated or edited, write it again") from error
        self.names: frozenset[str] = frozenset(self._file.keys())

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`, a view of the mapped file: copy what must outlive it. Raises CheckpointError."""
        if name not in self.names:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing; truncated or edited, write it again")
        tensor = self._file.get_tensor(name)
        assert isinstance(tensor, torch.Tensor)
        return tensor


def read_tensors(path: Path, digest: str | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, whose SHA-256 must be `digest` if given. Raises CheckpointError."""
    if digest is not None:
        check_digest(path, digest)
    file = TensorFile(path)
    return {name: file.tensor(name).clone() for name in sorted(file.names)}


def _flush_to_disk(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # Windows cannot open a folder; its rename is journaled
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is repeated")
    return values


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
