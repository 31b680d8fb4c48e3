"""Each family goes through the chain once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from families import SMALL, FamilyRun, run_family


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FamilyRun]:
    @cache
    def run(name: str) -> FamilyRun:
        return run_family(SMALL[name], tmp_path_factory.mktemp(name))

    return run
