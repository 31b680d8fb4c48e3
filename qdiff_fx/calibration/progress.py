"""Progress bars that stay quiet where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def shows_progress(progress: bool | None) -> bool:
    """Whether to show bars: as asked for; None does where stderr is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


def progress_bar(description: str, *, total: int | None, progress: bool | None, unit: str = "it") -> Any:
    """A tqdm bar with an ETA. `progress` None shows it only when stderr is a terminal."""
    return tqdm(desc=description, total=total, disable=not shows_progress(progress), leave=False, unit=unit)


@contextmanager
def named_steps(description: str, *, total: int, progress: bool | None) -> Iterator[Callable[[str], None]]:
    """A bar over `total` unlike steps: each is announced by name as it begins, which ends the one before."""
    with progress_bar(description, total=total, progress=progress, unit="step") as bar:
        begun = False

        def begin(name: str) -> None:
            nonlocal begun
            if begun:
                bar.update(1)
            begun = True
            bar.set_postfix_str(name)

        yield begin
        bar.update(1 if begun else 0)
