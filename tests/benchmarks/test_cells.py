"""Pages keep the cells of other runs."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

import peers_page
import results_page
from cells import gathered, matching
from qdiff_fx.safe_io import write_json


def test_a_page_keeps_what_was_not_measured_anew(tmp_path: Path) -> None:
    page = tmp_path / "page.json"
    assert gathered([{"cell": "a", "db": 1.0}], page, itemgetter("cell")) == {"a": {"cell": "a", "db": 1.0}}
    write_json(page, {"cells": [{"cell": "a", "db": 1.0}, {"cell": "b", "db": 2.0}]})
    rows = gathered([{"cell": "c", "db": 4.0}, {"cell": "b", "db": 3.0}], page, itemgetter("cell"))
    assert {name: row["db"] for name, row in rows.items()} == {"a": 1.0, "b": 3.0, "c": 4.0}


def test_globs_ask_for_cells_and_a_wrong_one_is_told() -> None:
    names = ("model/w8a8", "model/w4a8", "other/w4a8")
    assert matching(names, ["*w4*", "model/*"]) == ["model/w4a8", "other/w4a8", "model/w8a8"]
    assert matching(names, []) == []
    with pytest.raises(SystemExit, match="no cell is called 'w4a8'; there are model/w8a8, model/w4a8, other/w4a8"):
        matching(names, ["model/*", "w4a8"])


@pytest.mark.parametrize(
    ("before", "new", "kept"),
    [
        ({"error": None, "db": 1.0}, {"error": "ImportError", "db": 2.0}, 1.0),
        ({"error": "ImportError", "db": 1.0}, {"error": "OSError", "db": 2.0}, 2.0),
        ({"error": None, "db": 1.0}, {"error": None}, 1.0),
    ],
)
def test_a_tool_that_is_missing_takes_no_measurement_away(
    before: dict[str, Any], new: dict[str, Any], kept: float
) -> None:
    assert peers_page._measured(before, new)["db"] == kept


def test_a_share_of_the_samples_takes_no_full_cell_away() -> None:
    full, tenth = {"share": 1.0}, {"share": 0.1}
    assert results_page._larger(full, tenth) is full
    assert results_page._larger(tenth, full) is full
