"""The cuda backend is refused with the reason where it cannot run, and importing it needs no triton."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from qdiff_fx.errors import BackendError
from qdiff_fx.kernels import BACKENDS, cuda, select_backend

PATHS = os.pathsep.join(entry for entry in sys.path if entry)
CUDA = BACKENDS["cuda"]

_PROBE = """
import sys
from importlib.abc import MetaPathFinder
class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import importlib.util as util
found = util.find_spec
util.find_spec = lambda name, package=None: None if name == "triton" else found(name, package)
import qdiff_fx
from qdiff_fx.kernels import BACKENDS
print(BACKENDS["cuda"].unavailable("cuda"), "triton" in sys.modules)
"""


def test_without_triton_it_says_what_to_install() -> None:
    environment = os.environ | {"PYTHONPATH": PATHS, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "triton is not installed; pip install 'qdiff-fx[cuda]' False"


def test_a_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no CUDA GPU" in (CUDA.unavailable("cuda") or "")


def test_old_gpus_and_rocm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "sm_75" in (CUDA.unavailable("cuda") or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert CUDA.unavailable("cuda") is None
    monkeypatch.setattr(cuda, "torch", SimpleNamespace(cuda=torch.cuda, version=SimpleNamespace(hip="6.4")))
    assert "ROCm" in (CUDA.unavailable("cuda") or "")


def test_the_cpu_is_for_the_interpreter_and_never_chosen_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    from qdiff_fx.kernels.triton_kernels import launch

    assert CUDA.unavailable("cpu") is None, "tests run with TRITON_INTERPRET=1"
    assert select_backend("auto", "cpu").name != "cuda"
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(BackendError, match="the model is on cpu"):
        select_backend("cuda", "cpu")


def test_a_tensor_on_the_wrong_device_never_runs_on_the_cpu_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda_cases import LayerCase, prepare_layer
    from qdiff_fx.kernels.triton_kernels import launch

    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(BackendError, match="got a tensor on cpu"):
        prepare_layer(LayerCase()).run()
