"""The table of backends: unknown and unavailable ones are named with the reason, "auto" takes the first that runs."""

from __future__ import annotations

import pytest

from qdiff_fx import kernels
from qdiff_fx.errors import BackendError
from qdiff_fx.kernels import AUTO_ORDER, BACKENDS, Backend, select_backend
from qdiff_fx.passes.lower import LOWER


def test_every_backend_has_its_passes_and_its_own_name() -> None:
    assert set(BACKENDS) == set(LOWER)
    assert all(name == backend.name for name, backend in BACKENDS.items())
    assert set(AUTO_ORDER) <= set(BACKENDS) and AUTO_ORDER[-1] == "reference", "auto must always find one"


def test_the_reference_runs_everywhere() -> None:
    assert all(BACKENDS["reference"].unavailable(device) is None for device in ("cpu", "cuda"))


def test_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(BackendError, match=r"backend 'tpu': want auto, .*reference"):
        select_backend("tpu", "cpu")


def test_an_unavailable_backend_says_why_and_auto_passes_it_over(monkeypatch: pytest.MonkeyPatch) -> None:
    lame = Backend(name="lame", unavailable=lambda device: f"no such unit on {device}")
    monkeypatch.setattr(kernels, "BACKENDS", {"lame": lame, "reference": BACKENDS["reference"]})
    monkeypatch.setattr(kernels, "AUTO_ORDER", ("lame", "reference"))
    with pytest.raises(BackendError, match="backend 'lame' cannot run here: no such unit on cpu"):
        select_backend("lame", "cpu")
    assert select_backend("auto", "cpu").name == "reference"
