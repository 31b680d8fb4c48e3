"""Calls are taken apart into rows and put together again; the timestep is found or the candidates named."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import nn

from qdiff_fx.calibration.call_form import NUMBER, ROW, WHOLE, one_row
from qdiff_fx.calibration.split_call import CallRows, parameter_names, split_call
from qdiff_fx.errors import InputError


def _rebuilt(rows: CallRows) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pairs = zip(rows.form.leaves, rows.leaves, strict=True)
    return rows.form.call([leaf if spec.kind == ROW else one_row(spec, leaf[0]) for spec, leaf in pairs])


def test_nested_call_is_rebuilt_as_it_was() -> None:
    x, context, pooled = torch.randn(3, 2, 4, 4), torch.randn(3, 5, 6), torch.randn(3, 7)
    residuals = [torch.randn(3, 8, 2, 2), (torch.randn(3, 8, 1, 1), None)]
    kwargs = {"added": {"pooled": pooled, "flags": [True, "full"]}, "residuals": residuals, "scale": 0.5, "count": 3}
    rows = split_call((x, torch.tensor(7), context), kwargs)
    args, rebuilt = _rebuilt(rows)
    assert isinstance(args, tuple)
    torch.testing.assert_close(args, (x, torch.tensor(7), context), rtol=0, atol=0)
    assert rebuilt["added"]["flags"] == [True, "full"]
    assert isinstance(rebuilt["residuals"], list) and isinstance(rebuilt["residuals"][1], tuple)
    assert torch.equal(rebuilt["residuals"][1][0], residuals[1][0]) and rebuilt["residuals"][1][1] is None
    assert (type(rebuilt["scale"]), rebuilt["scale"], type(rebuilt["count"])) == (float, 0.5, int)
    assert [spec.name for spec in rows.form.leaves][:4] == ["0", "1", "2", "added.pooled"]


@pytest.mark.parametrize(
    ("timestep", "kind", "values"),
    [
        (torch.tensor(5), WHOLE, [5.0, 5.0]),
        (torch.tensor([5.5]), ROW, [5.5, 5.5]),
        (torch.tensor([1, 2]), ROW, [1.0, 2.0]),
        (torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1), ROW, [1.0, 2.0]),
        (3, NUMBER, [3.0, 3.0]),
        (0.25, NUMBER, [0.25, 0.25]),
        (numpy.float32(0.25), NUMBER, [0.25, 0.25]),
    ],
    ids=["0-d", "one", "row", "4-d", "int", "float", "numpy"],
)
def test_timestep_of_every_usual_kind_is_read_by_row(timestep: Any, kind: str, values: list[float]) -> None:
    rows = split_call((torch.zeros(2, 3, 4, 4),), {"sigma": timestep})
    assert rows.form.timestep is not None
    assert rows.form.leaves[rows.form.timestep].kind == kind
    assert rows.timesteps.tolist() == values


@pytest.mark.parametrize(
    ("args", "kwargs", "asked", "found"),
    [
        ((torch.zeros(2, 3), torch.tensor(9.0)), {}, None, 9.0),
        ((torch.zeros(2, 3), torch.zeros(2, 3, 3), torch.tensor(9.0)), {"t": 1}, None, 1.0),
        ((torch.zeros(2, 3), torch.tensor(9.0)), {"noise": 4}, "noise", 4.0),
        ((torch.zeros(2, 3), 8, torch.tensor(9.0)), {}, 2, 9.0),
        ((torch.zeros(2, 3), 8, torch.tensor(9.0)), {}, -1, 9.0),
    ],
    ids=["first other", "by usual name", "asked name", "asked position", "negative position"],
)
def test_timestep_is_found_by_request_then_usual_name_then_shape(
    args: tuple[Any, ...], kwargs: dict[str, Any], asked: str | int | None, found: float
) -> None:
    assert split_call(args, kwargs, timestep=asked).timesteps.tolist() == [found, found]


def test_positional_arguments_go_by_their_parameter_names() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, other: float, timestep: int, *rest: int, **more: int) -> None: ...

    names = parameter_names(Model())
    assert names == ("x", "other", "timestep")
    assert split_call((torch.zeros(1, 1), 5.0, 6), {}, names=names).timesteps.tolist() == [6.0]


@pytest.mark.parametrize("asked", [None, "sigmas", 5])
def test_missing_timestep_names_the_candidates(asked: str | int | None) -> None:
    with pytest.raises(InputError, match=r"no timestep found .* inputs: sample \[2, 3\], context \[2, 4, 5\]"):
        split_call((torch.zeros(2, 3), torch.zeros(2, 4, 5)), {}, names=("sample", "context"), timestep=asked)


def test_broadcast_rows_are_expanded_and_unbatched_tensors_stay_whole() -> None:
    rows = split_call((torch.zeros(4, 3), 1, torch.ones(1, 5, 6), torch.ones(77)), {})
    assert [spec.kind for spec in rows.form.leaves] == [ROW, NUMBER, ROW, WHOLE]
    assert [tuple(leaf.shape) for leaf in rows.leaves] == [(4, 3), (4,), (4, 5, 6), (4, 77)]


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((torch.zeros(2, 3), 1, object()), "input 2 is a object"),
        ((torch.zeros(2, 3, dtype=torch.complex64), 1), "complex64"),
        ((torch.zeros(0, 3), 1), "has no rows"),
        ((torch.zeros(()), 1), "no tensor with a batch dimension"),
        ((torch.zeros(2, 3), torch.tensor([1.0, torch.nan])), "not finite"),
        ((torch.zeros(2, 3), torch.zeros(3)), "want one number"),
    ],
    ids=["object", "complex", "empty", "no batch", "nan", "wrong length"],
)
def test_inputs_that_cannot_be_kept_are_named(args: tuple[Any, ...], match: str) -> None:
    with pytest.raises(InputError, match=match):
        split_call(args, {})
