"""What "auto" runs on CPUs of other instruction sets counts right; x86 is refused where its kernels do not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qdiff_fx.kernels import BACKENDS
from qdiff_fx.kernels.machine import instruction_sets
from qdiff_fx.kernels.x86_native import native_kernels

_PROBE = """
import torch
from qdiff_fx.errors import BackendError
from qdiff_fx.kernels import select_backend, x86

chosen = select_backend("auto", "cpu").name

# The largest codes by weights of one sign: sums of two products exceed 16 bits.
x = torch.randint(200, 256, (3, 64), dtype=torch.uint8)
weight = torch.randint(100, 128, (64, 64), dtype=torch.int8)
wanted = (x.long() @ weight.long().T).float()
scale, image, kernel = torch.ones(64), x[:, :, None, None], weight[:, :, None, None]
geometry = ([1, 1], [0, 0], [1, 1], 1)
if chosen == "x86":
    linear = x86.linear_call(weight, scale, None, 1.0, 0, torch.float32)(x)
    conv = x86.conv2d_call(kernel, scale, None, 1.0, 0, geometry, image.shape, torch.float32)(image)
else:
    assert chosen == "reference"
    stored = (scale, None, None, None, 1.0, 0)
    linear = torch.ops.qdiff.linear(x, weight, *stored, [64, 64], torch.float32)
    conv = torch.ops.qdiff.conv2d(image, kernel, *stored, [64, 64, 1, 1], *geometry, torch.float32)
right = torch.equal(linear, wanted) and torch.equal(conv[:, :, 0, 0], wanted)
print(chosen, "is right" if right else "is wrong")
try:
    print(select_backend("x86", "cpu").name)
except BackendError as error:
    print(error)
"""


def _probed(isa: str, **variables: str) -> list[str]:
    """What auto chose and whether it counts right, then x86 or the reason against it."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "PYTHONWARNINGS": "ignore"} | variables
    done = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-2:]


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_where_kernels_saturate_auto_is_right_and_x86_refused(isa: str) -> None:
    """Where ours cannot be compiled auto falls to the reference; who asks for x86 hears why and the two ways out."""
    chosen, refusal = _probed(isa, CXX="no-such-compiler")
    assert chosen == "reference is right"
    assert "cannot run here" in refusal and "'reference'" in refusal and "bf16" in refusal
    assert "saturate" in refusal or "x86_64" in refusal or "oneDNN" in refusal


@pytest.mark.skipif(native_kernels() is None, reason="no kernels of our own here")
def test_kernels_of_our_own_are_right_where_onednn_saturates() -> None:
    assert _probed("AVX2") == ["x86 is right", "x86"]


@pytest.mark.skipif("avx512_vnni" not in instruction_sets(), reason="the CPU has no AVX512-VNNI")
def test_for_onednn_vnni_without_anything_newer_is_enough() -> None:
    assert _probed("AVX512_CORE_VNNI", CXX="no-such-compiler") == ["x86 is right", "x86"]


def test_x86_runs_on_cpus_only() -> None:
    assert "cuda" in (BACKENDS["x86"].unavailable("cuda") or "")
