"""The standard quantize/dequantize form: operators that other PyTorch consumers match and fuse."""

from __future__ import annotations

# Registers torch.ops.quantized_decomposed; the one import from torch.ao, which has no other home yet.
import torch.ao.quantization.fx._decomposed  # noqa: F401

from qdiff_fx.kernels.backend import Backend

QDQ = Backend(name="qdq", unavailable=lambda device: None)
"""Runs everywhere, in floating point, until a consumer compiles it: a form to hand on, not one to be fast."""
