"""The cells of a page: those that a work folder has, and those of other runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qdiff_fx.safe_io import read_json

Row = Mapping[str, Any]


def matching(names: Collection[str], patterns: Iterable[str]) -> list[str]:
    """Names that globs ask for, each once, in the globs' order; a glob that names nothing ends the program."""
    found = {pattern: [name for name in names if fnmatchcase(name, pattern)] for pattern in patterns}
    for pattern, some in found.items():
        if not some:
            raise SystemExit(f"no cell is called {pattern!r}; there are {', '.join(names)}")
    return list(dict.fromkeys(name for some in found.values() for name in some))


def gathered(
    rows: Iterable[Row],
    published: Path,
    key: Callable[[Row], Hashable],
    choose: Callable[[Row, Row], Row] = lambda before, new: new,
) -> dict[Hashable, Row]:
    """Cells by key: those of the page in their order, then new ones.

    Args:
      rows: finished cells of the work folder; nothing here checks that it is newer than the page.
      published: the page's JSON; its cells are under "cells".
      key: what tells one cell from another.
      choose: what stays of a cell that the page had (first) and the work folder has (second).
    """
    found = {key(row): row for row in read_json(published)["cells"]} if published.is_file() else {}
    for row in rows:
        name = key(row)
        found[name] = choose(found[name], row) if name in found else row
    return found
