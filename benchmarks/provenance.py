"""What a cell was measured with: command, commit, machine, seed."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qdiff_fx.kernels.machine import describe_machine


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


def commits(rows: Iterable[Mapping[str, Any]]) -> str:
    """Those that cells were measured at, each once."""
    return ", ".join(dict.fromkeys(f"`{row.get('commit', 'unknown')}`" for row in rows))


def machines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Those that cells were measured on, each once."""
    return "; ".join(dict.fromkeys("{processor}, {isa}, {threads} thread(s)".format(**row["machine"]) for row in rows))


def slug(name: str) -> str:
    """A file name for a cell."""
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name.lower().replace(" ", "-"))
