"""A small network that is calibrated once; every test reconstructs a copy of its quantizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import qdiff_fx
from qdiff_fx.reconstruction import BlockResult, ReconstructionConfig, reconstruct
from subjects import calls_of, sketch_inputs

TINY: dict[str, Any] = {
    "weight_iterations": 60,
    "weight_learning_rate": 0.05,
    "activation_iterations": 20,
    "batch_size": 8,
}
"""Few steps at a rate that still saturates the rounding variables."""


@pytest.fixture(scope="session")
def _calibrated(sketch: nn.Module, preparer: Any) -> qdiff_fx.PreparedUNet:
    prepared = preparer(sketch, qdiff_fx.QDiffConfig.preset("w4a8"), example_inputs=sketch_inputs())
    qdiff_fx.calibrate(prepared, calls_of(sketch, batch=8), progress=False)
    return prepared


@pytest.fixture
def calibrated(_calibrated: qdiff_fx.PreparedUNet) -> qdiff_fx.PreparedUNet:
    return copy.deepcopy(_calibrated)


@pytest.fixture
def run(sketch: nn.Module) -> Callable[..., tuple[BlockResult, ...]]:
    """`run(prepared, **changes of ReconstructionConfig)`, on the calls that the network was calibrated with."""

    def reconstructed(
        prepared: qdiff_fx.PreparedUNet, *, folder: Any = None, identity: Any = None, **changes: Any
    ) -> Any:
        flat = [prepared.signature.flatten(args, kwargs) for args, kwargs in calls_of(sketch, batch=8)]
        return reconstruct(
            prepared.graph_module,
            prepared.signature.names,
            lambda: iter(flat),
            24,
            ReconstructionConfig(**{**TINY, **changes}),
            identity=identity or {"model": "a"},
            checkpoint_dir=folder,
            progress=False,
        )

    return reconstructed
