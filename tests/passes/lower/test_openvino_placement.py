"""What is told of layers run by OpenVINO, on any CPU; where kernels saturate, results are not looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

pytest.importorskip("openvino")

import qdiff_fx
from qdiff_fx.errors import BackendError
from qdiff_fx.kernels.openvino_nodes import known_answer
from qdiff_fx.kernels.openvino_nodes.program import Program, RunsOn
from subjects import Preparer


@pytest.fixture(autouse=True)
def _any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_answer, "known_answers_hold", lambda: True)


@pytest.fixture(scope="module")
def prepared(sketch: nn.Module, preparer: Preparer) -> qdiff_fx.PreparedUNet:
    return preparer.fitted(sketch, "w4a8")


def change_placement(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, RunsOn]], dict[str, RunsOn]]) -> None:
    placement = Program.placement
    monkeypatch.setattr(Program, "placement", lambda self: change(dict(placement(self))))


def fallback_of(prepared: qdiff_fx.PreparedUNet, layer: str) -> str:
    rows: Any = qdiff_fx.convert(prepared, backend="openvino").lowering_report().rows
    return str(next(row for row in rows if row.layer == layer).fallback)


def test_every_integer_layer_is_named_by_a_kernel_for_integers(prepared: qdiff_fx.PreparedUNet) -> None:
    rows = qdiff_fx.convert(prepared, backend="openvino", strict=True).lowering_report().rows
    integer = [row for row in rows if " u8 " in row.kernel]
    assert len(integer) > 5 and not any(row.fallback for row in integer)
    assert not [row for row in rows if "part of another kernel" in row.kernel]


def test_a_layer_that_lost_its_integers_is_a_fallback_that_strict_refuses(
    prepared: qdiff_fx.PreparedUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = RunsOn(kind="Convolution", precision="f32", implementation="ref")
    change_placement(
        monkeypatch,
        lambda found: {name: seen if runs.kind == "Convolution" else runs for name, runs in found.items()},
    )
    assert fallback_of(prepared, "wide") == "OpenVINO runs it in f32"
    with pytest.raises(BackendError, match="wide: OpenVINO runs it in f32"):
        qdiff_fx.convert(prepared, backend="openvino", strict=True)


def test_an_integer_layer_that_no_kernel_names_is_a_fallback_that_strict_refuses(
    prepared: qdiff_fx.PreparedUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_placement(
        monkeypatch, lambda found: {name: runs for name, runs in found.items() if runs.kind != "Convolution"}
    )
    assert "no kernel of OpenVINO's compiled model names it" in fallback_of(prepared, "wide")
    assert not fallback_of(prepared, "stem")  # in the carrier type by the plan, so nothing is lost
    with pytest.raises(BackendError, match="wide: no kernel of OpenVINO"):
        qdiff_fx.convert(prepared, backend="openvino", strict=True)
