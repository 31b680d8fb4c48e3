"""The cuda backend: int8 tensor-core kernels in Triton, and torch._int_mm."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from qdiff_fx.kernels import cuda_ops as cuda_ops  # registers the operators
from qdiff_fx.kernels.backend import Backend
from qdiff_fx.kernels.cuda_gpu import refusal


def _unavailable(device: str) -> str | None:
    """Why the kernels cannot be used on `device`, None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install 'qdiff-fx[cuda]'"
    if device == "cpu":
        from qdiff_fx.kernels.triton_kernels.launch import interpreted

        if interpreted():
            return None
        return "the model is on cpu; move it with .to('cuda') (TRITON_INTERPRET=1 simulates the kernels, for tests)"
    if device != "cuda" or not torch.cuda.is_available():
        return f"the model is on {device} and torch finds no CUDA GPU; use backend='auto'"
    if torch.version.hip is not None:
        return "this build of PyTorch is for ROCm, where the kernels were never compiled; use backend='reference'"
    return refusal(torch.cuda.get_device_capability())


CUDA = Backend(name="cuda", unavailable=_unavailable, devices=("cuda",))
