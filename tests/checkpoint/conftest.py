"""A stored model to damage, and a way to edit its plan as an attacker would: with a digest that fits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdiff_fx.checkpoint.plan import seal_plan

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden file of format version 1."""
    shutil.copytree(GOLDEN, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def edit(folder: Path) -> Callable[[Edit], None]:
    """`edit(change)` applies `change` to the plan and seals it again."""

    def edited(change: Edit) -> None:
        path = folder / "plan.json"
        plan = json.loads(path.read_text())
        change(plan)
        path.write_bytes(seal_plan({key: plan[key] for key in plan if key != "digest"}))

    return edited
