"""backend="auto" with autotune=True takes the backend whose step is faster, says so, and copies do not choose anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qdiff_fx
from qdiff_fx import kernels, lowering, model, step_timing
from qdiff_fx.autotune import x86
from qdiff_fx.autotune.layer_size import LayerSize
from qdiff_fx.errors import BackendError
from qdiff_fx.graph.meta import LayerTiming
from qdiff_fx.kernels import BACKENDS, RIVALS
from qdiff_fx.step_timing import step_milliseconds
from subjects import Preparer

_REASON = next(filter(None, (BACKENDS[name].unavailable("cpu") for name in RIVALS)), None)
pytestmark = pytest.mark.skipif("saturate" in (_REASON or ""), reason=str(_REASON))


@pytest.fixture(scope="module")
def prepared(sketch: nn.Module, preparer: Preparer) -> qdiff_fx.PreparedUNet:
    return preparer.fitted(sketch)


@pytest.fixture(autouse=True)
def _layers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(size: LayerSize) -> LayerTiming:
        return LayerTiming(integer=1.0, carrier=2.0)

    monkeypatch.setattr(x86, "measure", measure)


@pytest.mark.parametrize("fastest", RIVALS)
def test_the_faster_step_decides_once(
    prepared: qdiff_fx.PreparedUNet, monkeypatch: pytest.MonkeyPatch, fastest: str
) -> None:
    calls: list[list[str]] = []

    def clock(lowered: Any, plan: Any) -> dict[str, float]:
        calls.append(list(lowered))
        return {name: 1.5 if name == fastest else 20.0 for name in lowered}

    monkeypatch.setattr(step_timing, "step_milliseconds", clock)
    quantized = qdiff_fx.convert(prepared, autotune=True)
    assert quantized.backend == quantized.lowering_report().backend == fastest
    text = str(quantized.lowering_report())
    assert f"{fastest} 1.5 ms" in text and "20 ms" in text
    clone = copy.deepcopy(quantized)
    assert calls == [list(RIVALS)]
    assert clone.backend == fastest and str(clone.lowering_report()) == text


def test_a_backend_that_refuses_the_network_leaves_it_to_the_others(
    prepared: qdiff_fx.PreparedUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*names: str) -> Callable[..., Any]:
        def lower(plan: Any, backend: str, *args: Any, **options: Any) -> Any:
            if backend in names:
                raise BackendError(f"{backend} has no aten.roll")
            return lowering.lower(plan, backend, *args, **options)

        return lower

    monkeypatch.setattr(model, "lower", refusing("openvino"))
    quantized = qdiff_fx.convert(prepared, autotune=True)
    text = str(quantized.lowering_report())
    assert quantized.backend == "x86" and "; not openvino: openvino has no aten.roll" in text
    assert str(copy.deepcopy(quantized).lowering_report()) == text
    monkeypatch.setattr(model, "lower", refusing(*RIVALS))
    with pytest.raises(BackendError, match=r"x86 has no aten.roll; openvino has no aten.roll"):
        qdiff_fx.convert(prepared, autotune=True)


def test_without_autotune_or_by_name_nothing_is_timed(
    prepared: qdiff_fx.PreparedUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_timing, "step_milliseconds", None)
    assert qdiff_fx.convert(prepared).backend == "x86"
    assert qdiff_fx.convert(prepared, backend="openvino", autotune=True).backend == "openvino"
    monkeypatch.setattr(kernels, "RIVALS", ("x86",))  # as where the package is missing
    assert qdiff_fx.convert(prepared, autotune=True).backend == "x86"


def test_a_step_is_one_call_of_the_examples_sizes(prepared: qdiff_fx.PreparedUNet) -> None:
    quantized = qdiff_fx.convert(prepared, backend="reference")
    sizes: list[list[tuple[int, ...]]] = []

    class Watch(nn.Module):
        def forward(self, *inputs: torch.Tensor) -> None:
            sizes.append([tuple(item.shape) for item in inputs])

    times = step_milliseconds({"watched": Watch()}, quantized.plan)  # type: ignore[dict-item]
    assert times["watched"] >= 0
    assert set(map(str, sizes)) == {str([(2, 2, 8, 8), (2,)])}
