"""Set-up that every test shares: only the installed package is seen, shapes are checked, randomness is fixed."""

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` puts the repository root on sys.path. There, `import observers` would load a second copy of
# qdiff_fx.observers under another name, whose classes fail every isinstance check against the first.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Shape annotations cost time on every call, so only the tests execute them. The hook rewrites modules while they are
# imported, hence here, before any test imports qdiff_fx.
jaxtyping.install_import_hook(("qdiff_fx.numerics", "qdiff_fx.observers"), "beartype.beartype")

# The cuda backend's kernels run in Triton's interpreter, on the CPU, which is chosen when they are decorated. Tests on
# a GPU set it to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The gate gives the same verdict every time, on a busy machine too. `pytest --hypothesis-profile=explore` searches.
hypothesis.settings.register_profile("gate", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("gate")


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Shape checks off: the compiler cannot trace through them, and wrong input must reach the function's check."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(autouse=True)
def _seed_torch() -> None:
    """Modules initialise their weights from the global generator; a test must not depend on the ones run before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Compiled code of one test must not count towards the next one's recompile limit."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


# Capturing and calibrating take seconds; what many tests look at and none changes is made once.


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


@pytest.fixture(scope="session")
def unconditional() -> nn.Module:
    from subjects import unconditional_unet

    return _seeded(unconditional_unet)


@pytest.fixture(scope="session")
def conditional() -> nn.Module:
    from subjects import conditional_unet

    return _seeded(conditional_unet)


@pytest.fixture(scope="session")
def sketch() -> nn.Module:
    from subjects import Sketch

    return _seeded(Sketch).eval()


@pytest.fixture(scope="session")
def preparer() -> Any:
    from subjects import Preparer

    return Preparer()


@pytest.fixture(scope="session")
def quantized(preparer: Any, unconditional: nn.Module) -> Any:
    """The unconditional model at 4-bit weights, on the reference."""
    import qdiff_fx

    torch.manual_seed(0)
    return qdiff_fx.convert(preparer.fitted(unconditional, "w4a8"), backend="reference")


@pytest.fixture(scope="session")
def foreign() -> Callable[[type[nn.Module]], Any]:
    from subjects import foreign_net

    return cache(foreign_net)
