"""A block of calibration rows of one form, in memory or in a safetensors file that is mapped when it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from qdiff_fx.calibration.call_form import ROW, CallForm
from qdiff_fx.errors import CheckpointError
from qdiff_fx.safe_io import TensorFile, check_digest, tensor_bytes

_TIMESTEP, _KEY, _DIGEST = "timestep", "key", "digest"


class Shard:
    """Rows of one form. Reading a row touches no other row's bytes.

    Stored tensors: "timestep" [n] float64; "key" [n] int64 (rows with equal keys can share a call: same form, equal
    values of all leaves without batch dimension); "digest" [n, 32] uint8 (SHA-256 of the row); for leaf i
    "leaf.i" [n, *shape], or where rows repeat (contexts do at every timestep) "leaf.i" [unique, *shape] with
    "index.i" [n] int64.
    """

    def __init__(
        self,
        form: CallForm,
        rows: int,
        *,
        tensors: Mapping[str, torch.Tensor] | None = None,
        path: Path | None = None,
        digest: str | None = None,
    ) -> None:
        """A block of `rows` rows held in `tensors`, or in the file `path` (whose SHA-256 is checked if given)."""
        self.form = form
        self.rows = rows
        self.path = path
        self._tensors = tensors
        self.digest = digest
        self._file: TensorFile | None = None

    @property
    def timesteps(self) -> torch.Tensor:
        """[n] float64; NaN for calls without timestep."""
        return self._tensor(_TIMESTEP)

    @property
    def keys(self) -> torch.Tensor:
        """[n] int64."""
        return self._tensor(_KEY)

    @property
    def digests(self) -> torch.Tensor:
        """[n, 32] uint8."""
        return self._tensor(_DIGEST)

    def leaf(self, leaf: int, rows: torch.Tensor) -> torch.Tensor:
        """A copy [k, *shape] of the leaf's values in `rows` ([k] int64)."""
        pool = self._tensor(_leaf_name(leaf))
        return pool[self._tensor(_index_name(leaf))[rows] if self._has(_index_name(leaf)) else rows]

    def check(self, *, content: bool) -> None:
        """Raise CheckpointError unless the file fits the form and, if `content`, has the recorded SHA-256."""
        if content and self.path is not None and self.digest is not None:
            check_digest(self.path, self.digest)
        self._check_tensor(_TIMESTEP, [self.rows], torch.float64)
        self._check_tensor(_KEY, [self.rows], torch.int64)
        self._check_tensor(_DIGEST, [self.rows, 32], torch.uint8)
        for i, spec in enumerate(self.form.leaves):
            pooled = self._has(_index_name(i))
            unique = len(self._tensor(_leaf_name(i))) if pooled else self.rows
            self._check_tensor(_leaf_name(i), [unique, *spec.shape], spec.torch_dtype)
            if pooled:
                self._check_tensor(_index_name(i), [self.rows], torch.int64)
                index = self._tensor(_index_name(i))
                if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < unique):
                    raise CheckpointError(f"{self.path}: rows of {spec.name} point outside it; edited, write it again")

    def _check_tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        found = self._tensor(name)
        if list(found.shape) != list(shape) or found.dtype != dtype:
            raise CheckpointError(
                f"{self.path}: {name} has shape {list(found.shape)} of {found.dtype}, want {list(shape)} of {dtype}; "
                "edited, write it again"
            )

    def _has(self, name: str) -> bool:
        return name in self._tensors if self._tensors is not None else name in self._opened().names

    def _tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name] if self._tensors is not None else self._opened().tensor(name)

    def _opened(self) -> TensorFile:
        if self._file is None:
            assert self.path is not None
            self._file = TensorFile(self.path)
        return self._file


def pack_rows(
    form: CallForm, timesteps: torch.Tensor, leaves: Sequence[Iterable[torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The tensors of a shard, on the CPU; the same rows give the same bytes.

    Args:
      form: of all rows.
      timesteps: [n] float64.
      leaves: for each leaf of the form its n rows [*shape], or one tensor [n, *shape]. Repeated rows are not copied.
    """
    rows = len(timesteps)
    packed: dict[str, torch.Tensor] = {}
    hashes: list[list[bytes]] = []
    for i, leaf in enumerate(leaves):
        values = list(leaf)
        leaf_hashes = [hashlib.sha256(tensor_bytes(value)).digest() for value in values]
        hashes.append(leaf_hashes)
        first_row: dict[bytes, int] = {}
        for row, value in enumerate(leaf_hashes):
            first_row.setdefault(value, row)
        if len(first_row) <= rows // 2:
            order = {value: position for position, value in enumerate(first_row)}
            packed[_index_name(i)] = torch.tensor([order[value] for value in leaf_hashes], dtype=torch.int64)
            values = [values[row] for row in first_row.values()]
        packed[_leaf_name(i)] = torch.stack(values).detach().cpu()
    steps = timesteps.to("cpu", torch.float64).contiguous()
    digests, keys = bytearray(), []
    for row in range(rows):
        shared = hashlib.sha256(form.digest)
        whole = hashlib.sha256(form.digest + tensor_bytes(steps[row]))
        for spec, leaf_hashes in zip(form.leaves, hashes, strict=True):
            whole.update(leaf_hashes[row])
            if spec.kind != ROW:
                shared.update(leaf_hashes[row])
        digests += whole.digest()
        keys.append(int.from_bytes(shared.digest()[:8], "little", signed=True))
    packed[_TIMESTEP] = steps
    packed[_KEY] = torch.tensor(keys, dtype=torch.int64)
    packed[_DIGEST] = torch.frombuffer(digests, dtype=torch.uint8).reshape(rows, 32)
    return packed


def _leaf_name(leaf: int) -> str:
    return f"leaf.{leaf:03d}"


def _index_name(leaf: int) -> str:
    return f"index.{leaf:03d}"
