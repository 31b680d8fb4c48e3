"""Pages keep the cells of other runs."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path

from provenance import gathered
from qdiff_fx.safe_io import write_json


def test_a_page_keeps_what_was_not_measured_anew(tmp_path: Path) -> None:
    page = tmp_path / "page.json"
    assert gathered([{"cell": "a", "db": 1.0}], page, itemgetter("cell")) == [{"cell": "a", "db": 1.0}]
    write_json(page, {"cells": [{"cell": "a", "db": 1.0}, {"cell": "b", "db": 2.0}]})
    rows = gathered([{"cell": "b", "db": 3.0}, {"cell": "c", "db": 4.0}], page, itemgetter("cell"))
    assert {row["cell"]: row["db"] for row in rows} == {"a": 1.0, "b": 3.0, "c": 4.0}
