"""Measured figures that outlive a kill: a number a key, in a JSON file that knows which run it belongs to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdiff_fx.errors import CheckpointError
from qdiff_fx.safe_io import read_json, write_json


class KeptFigures:
    """Figures by key, taken over from `file` where an earlier run left some.

    Args:
      file: where they are kept; None keeps them in memory only.
      identity: digest of everything that they depend on.
      save_every: new figures between two writes.

    Raises: CheckpointError if `file` holds figures of another run, or is damaged.
    """

    def __init__(self, file: Path | None, identity: str, *, save_every: int = 1) -> None:
        self._file, self._identity, self._save_every = file, identity, save_every
        self._figures = {} if file is None or not file.exists() else _read(file, identity)
        self._unsaved = 0

    def __contains__(self, key: str) -> bool:
        return key in self._figures

    def __getitem__(self, key: str) -> float:
        return self._figures[key]

    def __setitem__(self, key: str, value: float) -> None:
        self._figures[key] = value
        self._unsaved += 1
        if self._unsaved >= self._save_every:
            self.save()

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Write what is not yet written when the block ends, however it ends."""
        try:
            yield
        finally:
            self.save()

    def save(self) -> None:
        """Write the file if there is one and anything is new."""
        if self._file is not None and self._unsaved:
            figures = {key: value if math.isfinite(value) else str(value) for key, value in self._figures.items()}
            write_json(self._file, {"identity": self._identity, "figures": figures})
        self._unsaved = 0


def _read(file: Path, identity: str) -> dict[str, float]:
    stored = read_json(file)
    if stored.get("identity") != identity:
        raise CheckpointError(
            f"{file} belongs to another model, config or calibration set; delete it or pass another checkpoint_dir"
        )
    figures = stored.get("figures")
    try:
        if not isinstance(figures, dict):
            raise TypeError
        return {key: float(value) for key, value in figures.items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: 'figures' is {json.dumps(figures)[:60]}, want a number a key; delete the file"
        ) from error
