"""Progress bars that stay quiet where nobody looks."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(description: str, *, total: int | None, progress: bool | None) -> Any:
    """A tqdm bar with an ETA. `progress` None shows it only when stderr is a terminal."""
    disable = not sys.stderr.isatty() if progress is None else not progress
    return tqdm(desc=description, total=total, disable=disable, leave=False)
