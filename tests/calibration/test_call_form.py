"""Forms survive JSON; malformed ones are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff_fx.calibration.call_form import CallForm
from qdiff_fx.calibration.split_call import split_call
from qdiff_fx.errors import CheckpointError

VALUES = st.recursive(
    st.none() | st.booleans() | st.text(max_size=3) | st.integers(0, 9) | st.builds(torch.zeros, st.just((2, 3))),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.lists(VALUES, max_size=3), st.dictionaries(st.text(max_size=3), VALUES, max_size=3))
def test_form_is_equal_after_json(args: list[Any], kwargs: dict[str, Any]) -> None:
    form = split_call((torch.zeros(2, 3), *args), kwargs, need_timestep=False).form
    again = CallForm.from_dict(json.loads(json.dumps(form.to_dict())), "index.json")
    assert again == form
    assert again.digest == form.digest


GOOD: dict[str, Any] = split_call((torch.zeros(2, 3), 1), {}).form.to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"args": {"list": []}},
        {"args": {"tuple": [{"leaf": 2}]}},
        {"args": {"tuple": [{"leaf": True}]}},
        {"args": {"tuple": [{"code": "import os"}]}},
        {"args": {"tuple": [{"value": 3}]}},
        {"args": {"tuple": [{"leaf": 0, "value": None}]}},
        {"kwargs": {"dict": [["a"]]}},
        {"kwargs": {"dict": [[1, {"value": None}]]}},
        {"timestep": 2},
        {"timestep": "t"},
        {"leaves": [3]},
        {"leaves": [GOOD["leaves"][0] | {"dtype": "object"}, GOOD["leaves"][1]]},
        {"leaves": [GOOD["leaves"][0] | {"kind": "column"}, GOOD["leaves"][1]]},
        {"leaves": [GOOD["leaves"][0] | {"shape": [-1]}, GOOD["leaves"][1]]},
    ],
)
def test_malformed_form_is_refused_naming_the_file(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"index\.json"):
        CallForm.from_dict(GOOD | change, "index.json")
