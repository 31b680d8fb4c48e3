"""Short rows say what the long plan says, and rows that were edited are refused."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_fx.checkpoint import read_model
from qdiff_fx.checkpoint.layout import fold, unfold
from qdiff_fx.checkpoint.plan import plan_digest
from qdiff_fx.errors import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"


def _plan(version: str) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((GOLDEN / version / "plan.json").read_text())
    return plan


def test_both_golden_files_say_the_same() -> None:
    first, second = _plan("v1"), unfold(_plan("v2"), "plan.json")
    for plan in (first, second):
        plan["nodes"] = sorted(plan["nodes"], key=lambda node: str(node["name"]))  # inputs came last in version 1
    same = [key for key in first if key not in ("format_version", "library_version", "digest")]
    assert {key: first[key] for key in same} == {key: second[key] for key in same}
    assert len(json.dumps(_plan("v2"))) < 0.5 * len(json.dumps(first))


def test_unfold_is_the_inverse_of_fold() -> None:
    plan = _plan("v1")
    plan["nodes"][-2]["kwargs"] = {"scale": {"tuple": [{"node": plan["nodes"][0]["name"]}, 1.5, None]}}
    plan["nodes"][-3].pop("meta", None)
    plan["nodes"][2]["meta"] = {"module": "down", "block": 3}
    plan["nodes"][-4]["name"], plan["nodes"][-3]["args"] = "another_name", [{"node": "another_name"}]
    plan["nodes"][-2]["args"] = [{"node": plan["nodes"][-3]["name"]}]
    assert json.dumps(unfold(fold(plan), ""), sort_keys=True) == json.dumps(plan, sort_keys=True)


@pytest.fixture
def damage(tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], Any]], Path]:
    """A copy of the golden file of version 2 with its stored rows changed under a digest that fits."""

    def damaged(change: Callable[[dict[str, Any]], Any]) -> Path:
        shutil.copytree(GOLDEN / "v2", tmp_path / "model")
        plan = _plan("v2")
        change(plan)
        plan["digest"] = plan_digest(plan)
        (tmp_path / "model" / "plan.json").write_text(json.dumps(plan))
        return tmp_path / "model"

    return damaged


def _row(plan: dict[str, Any], op: type) -> list[Any]:
    found: list[Any] = next(row for row in plan["nodes"] if isinstance(row[0], op) and len(row) > 2)
    return found


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no table": (lambda plan: plan.pop("strings"), "field 'strings' is missing"),
    "a table that is no list": (lambda plan: plan.update(specs={}), "specs: {}, want list"),
    "a place past the table": (lambda plan: _row(plan, int).__setitem__(0, 10**6), "want a place in a list"),
    "a place before it": (lambda plan: _row(plan, int).__setitem__(0, -1), "-1, want a place in a list"),
    "a place that is no number": (lambda plan: _row(plan, int).__setitem__(0, True), "True, want a place"),
    "a node that stands behind": (lambda plan: _row(plan, int)[2].__setitem__(0, {"n": 10**4}), "node: 10000, want"),
    "a tensor that is none": (lambda plan: _row(plan, str).__setitem__(1, None), "tensor: None, want a place"),
    "a row that is no list": (lambda plan: plan["nodes"].__setitem__(4, {}), r"nodes\[4\]: {}, want list"),
    "an empty row": (lambda plan: plan["nodes"].__setitem__(4, []), "want 3 to 5 fields"),
    "too many fields": (lambda plan: _row(plan, str).extend([{}] * 4), "want 3 to 4 fields"),
    "arguments that nest": (
        lambda plan: _row(plan, int).__setitem__(2, json.loads("[" * 50 + "]" * 50)),
        "nest more than 8 deep",
    ),
    "a layer that is an object": (
        lambda plan: next(row[3] for row in plan["nodes"] if len(row) > 3 and "layer" in row[3]).update(layer={}),
        r"layer {}, want \[name, operator",
    ),
    "tensors in rows of another length": (
        lambda plan: next(iter(plan["tensors"].values())).update(bias=[]),
        "want \\[dtype, shape, parameter, shard\\]",
    ),
    "a tensor twice": (
        lambda plan: plan["tensors"].update({"": {"down.bias": ["float32", [8], True, 0]}}),
        "'down.bias' stands twice",
    ),
    "an unused string": (lambda plan: plan["strings"].append("unused"), "spelled in another way"),
    "an empty meta": (lambda plan: plan["nodes"][0].append({}), "spelled in another way"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_edited_rows_are_refused(name: str, damage: Callable[..., Path]) -> None:
    change, message = DAMAGE[name]
    folder = damage(change)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model(folder, torch.device("cpu"))
    assert "\n" not in str(caught.value) and "plan.json" in str(caught.value)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 80) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["n", "tuple", "layer", "x"]), inner),
    max_leaves=6,
)


@settings(max_examples=150)
@given(data=st.data())
def test_whatever_stands_in_a_row_it_unfolds_or_is_refused(data: st.DataObject) -> None:
    plan = copy.deepcopy(_plan("v2"))
    target: Any = plan[data.draw(st.sampled_from(["nodes", "tensors", "strings", "specs"]))]
    while True:
        keys = list(target) if isinstance(target, dict) else range(len(target))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(target[key], (list, dict)) or not target[key] or data.draw(st.booleans()):
            target[key] = data.draw(_JSON)
            break
        target = target[key]
    with contextlib.suppress(CheckpointError):  # nothing else may come out
        unfold(plan, "plan.json")
