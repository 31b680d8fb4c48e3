"""Kernel tests run once a backend."""

from __future__ import annotations

import pytest

from contract_backends import KERNELS, Tried, tried_backend


@pytest.fixture(params=KERNELS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tried:
    return tried_backend(request.param, monkeypatch)
