"""autotune.json: timings of layers by machine, beside a stored model. They choose kernels; the result's bits follow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdiff_fx.autotune import Timings
from qdiff_fx.graph.meta import LayerTiming
from qdiff_fx.graph.record import expect, refuse
from qdiff_fx.safe_io import json_field, path_inside, read_json, write_json

TIMINGS_FILE = "autotune.json"
_VERSION = 1
_TEXT = re.compile(r"[ -~]{1,2000}")
_MOST_MACHINES, _MOST_LAYERS = 1000, 100_000
_LONGEST = 1e12


def read_timings(folder: Path) -> dict[str, Timings]:
    """Timings by machine signature, {} if the folder has none.

    Raises: CheckpointError naming the field for anything that `write_timings` does not write; delete the file then.
    """
    path = path_inside(folder, TIMINGS_FILE)
    if not path.is_file():
        return {}
    where = str(path)
    values = read_json(path)
    if json_field(values, "format_version", int, path) != _VERSION or set(values) != {"format_version", "machines"}:
        refuse(where, f"format_version={values['format_version']!r:.60}, want {_VERSION}; delete it to time anew")
    machines = _table(values["machines"], where, _MOST_MACHINES)
    return {name: _timings(table, f"{where}: {name:.60}") for name, table in machines.items()}


def write_timings(folder: Path, machines: Mapping[str, Timings]) -> None:
    """Put `machines` into the folder, atomically. Raises DiskError if it cannot be written."""
    tables = {name: {key: _entry(timing) for key, timing in timings.items()} for name, timings in machines.items()}
    write_json(folder / TIMINGS_FILE, {"format_version": _VERSION, "machines": tables})


def _entry(timing: LayerTiming) -> list[float | str]:
    return [timing.integer, timing.carrier, *([timing.kernel] if timing.kernel else [])]


def _timings(value: Any, where: str) -> Timings:
    found = {}
    for key, entry in _table(value, where, _MOST_LAYERS).items():
        place = f"{where}: {key:.80}"
        times, kernel = expect(entry, list, place)[:2], entry[2:]
        fits = len(times) == 2 and all(type(item) is float and 0 < item < _LONGEST for item in times)
        named = not kernel or (len(kernel) == 1 and isinstance(kernel[0], str) and _TEXT.fullmatch(kernel[0]))
        if not fits or not named:
            wanted = (
                "[microseconds on integers, microseconds in the carrier type], and the kernel where there are several"
            )
            refuse(place, f"{entry!r:.60}, want {wanted}")
        found[key] = LayerTiming(integer=times[0], carrier=times[1], kernel=kernel[0] if kernel else "")
    return found


def _table(value: Any, where: str, most: int) -> dict[str, Any]:
    table: dict[str, Any] = expect(value, dict, where)
    if len(table) > most:
        refuse(where, f"{len(table)} entries, want at most {most}")
    for key in table:
        if not _TEXT.fullmatch(key):
            refuse(where, f"{key!r:.60}, want printable ASCII")
    return table
