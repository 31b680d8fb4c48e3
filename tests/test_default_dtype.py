"""A default dtype other than float32 changes nothing: what is float32 says so itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qdiff_fx
from qdiff_fx.kernels import BACKENDS
from subjects import calls_of, sketch_inputs


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def _result(net: nn.Module, folder: Path, backend: str) -> Tensor:
    inputs, calls = sketch_inputs(), calls_of(net)
    torch.set_default_dtype(torch.bfloat16 if folder.name == "bfloat16" else torch.float32)
    prepared = qdiff_fx.prepare(net, example_inputs=inputs)
    learning = qdiff_fx.ReconstructionConfig(weight_iterations=2, activation_iterations=2, batch_size=2)
    qdiff_fx.calibrate(prepared, calls, reconstruction=learning, progress=False)
    qdiff_fx.save(qdiff_fx.convert(prepared, backend=backend), folder)
    result: Tensor = qdiff_fx.load(folder, backend)(*inputs)
    return result


@pytest.mark.parametrize("backend", ["reference", "x86", "openvino"])
def test_results_are_those_of_float32(backend: str, sketch: nn.Module, tmp_path: Path, restored: None) -> None:
    if (reason := BACKENDS[backend].unavailable("cpu")) is not None:
        pytest.skip(reason)
    results = []
    for name in ("float32", "bfloat16"):
        torch.manual_seed(0)
        results.append(_result(sketch, tmp_path / name, backend))
    assert results[1].dtype == torch.float32
    assert torch.equal(*results)
