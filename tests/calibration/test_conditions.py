"""Conditions are checked, drawn with one index, and differ between branches only where asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qdiff_fx.calibration.conditions import Conditions, draw_rows, gather_conditions
from qdiff_fx.errors import InputError

CPU = torch.device("cpu")


def _gather(**changes: Any) -> Conditions:
    arguments: dict[str, Any] = {
        "guidance_scale": 1.0,
        "encoder_hidden_states": None,
        "negative_encoder_hidden_states": None,
        "conditions": None,
        "negative_conditions": None,
        "context_size": None,
    }
    return gather_conditions(**arguments | changes)


def test_rows_of_a_trajectory_belong_together_in_every_condition() -> None:
    numbers = torch.arange(5.0)
    conditions = _gather(
        encoder_hidden_states=numbers.reshape(5, 1, 1),
        conditions={"class_labels": numbers, "added_cond_kwargs": {"text_embeds": numbers.reshape(5, 1)}},
    )
    (branch,) = conditions.branches(torch.tensor([4, 0, 2]), CPU)
    assert branch["class_labels"].tolist() == [4, 0, 2]
    assert branch["encoder_hidden_states"].flatten().tolist() == [4, 0, 2]
    assert branch["added_cond_kwargs"]["text_embeds"].flatten().tolist() == [4, 0, 2]


def test_unconditional_branch_comes_first_and_changes_only_what_is_negative() -> None:
    conditions = _gather(
        guidance_scale=2.0,
        encoder_hidden_states=torch.ones(3, 1, 1),
        negative_encoder_hidden_states=torch.zeros(1, 1, 1),
        conditions={"added": {"text": torch.ones(3, 1), "size": torch.ones(3, 2)}},
        negative_conditions={"added": {"text": torch.zeros(1, 1)}},
    )
    unconditional, conditional = conditions.branches(torch.tensor([0, 2]), CPU)
    assert unconditional["encoder_hidden_states"].eq(0).all() and conditional["encoder_hidden_states"].eq(1).all()
    assert unconditional["encoder_hidden_states"].shape == (2, 1, 1)
    assert unconditional["added"]["text"].eq(0).all() and unconditional["added"]["size"].eq(1).all()


def test_draw_uses_every_row_equally_often() -> None:
    drawn = draw_rows(5, 23, torch.Generator().manual_seed(0))
    assert sorted(torch.bincount(drawn, minlength=5).tolist()) == [4, 4, 5, 5, 5]
    assert drawn.tolist() == draw_rows(5, 23, torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"context_size": 6}, r"pass encoder_hidden_states= \[N, L, 6\]"),
        ({"guidance_scale": 3.0, "encoder_hidden_states": torch.ones(1, 1, 6)}, "needs both branches"),
        ({"encoder_hidden_states": torch.ones(2, 6)}, r"wants \[N, L, D\]"),
        ({"encoder_hidden_states": torch.ones(2, 4, 5), "context_size": 6}, r"wants \[N, L, 6\]"),
        ({"conditions": {"labels": [1, 2]}}, "labels: want a tensor"),
        ({"conditions": {"a": torch.ones(2), "b": torch.ones(3)}}, "b has 3 rows, other conditions 2"),
        (
            {"guidance_scale": 2.0, "conditions": {"a": torch.ones(3)}, "negative_conditions": {"a": torch.ones(2)}},
            "1 or 3 rows",
        ),
    ],
)
def test_conditions_that_do_not_fit_are_refused_with_the_remedy(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        _gather(**changes)
