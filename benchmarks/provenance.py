"""What a cell was measured with (command, commit, machine, seed), and where cells of other runs are kept."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qdiff_fx.kernels.machine import describe_machine
from qdiff_fx.safe_io import read_json


def origin(seed: int) -> dict[str, Any]:
    """Fields that every cell of every benchmark carries."""
    command = shlex.join(["python", *sys.argv])
    return {"command": command, "commit": commit(), "machine": describe_machine(), "seed": seed}


def commit() -> str:
    """Of the sources, with a mark if they are changed; what a benchmark writes into docs/ is no source."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", "benchmarks", "observers", "passes", "qdiff_fx"
    )
    return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")


def machines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Those that cells were measured on, each once."""
    return "; ".join(dict.fromkeys("{processor}, {isa}, {threads} thread(s)".format(**row["machine"]) for row in rows))


def gathered(
    rows: Iterable[Mapping[str, Any]], published: Path, key: Callable[[Mapping[str, Any]], Hashable]
) -> list[Mapping[str, Any]]:
    """Cells of a work folder, and those of a page that it has not measured anew.

    Args:
      rows: finished cells of the work folder.
      published: the page's JSON; its cells are under "cells".
      key: what tells one cell from another.
    """
    before = read_json(published)["cells"] if published.is_file() else ()
    return list({key(row): row for row in (*before, *rows)}.values())


def slug(name: str) -> str:
    """A file name for a cell."""
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name.lower().replace(" ", "-"))
