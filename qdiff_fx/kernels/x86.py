"""Which operator runs an integer layer on x86, what it is called with, and whether its results are right here.

Our own where the CPU has AVX512-VNNI and no AMX (docs/decisions/012) or AVX2 alone (014), oneDNN's elsewhere.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdiff_fx.kernels.backend import Backend
from qdiff_fx.kernels.x86_native import native_kernels
from qdiff_fx.kernels.x86_onednn import prepack_conv2d, prepack_linear

qdiff = torch.ops.qdiff

OUTPUT_DTYPES = (torch.float32, torch.bfloat16)
"""Carrier types that integer kernels write."""

Geometry = tuple[list[int], list[int], list[int], int]
"""Stride, padding, dilation and groups."""


def kernel_dtype(carrier: torch.dtype) -> torch.dtype:
    """What integer kernels write for a carrier type: itself, or float32 to be cast."""
    return carrier if carrier in OUTPUT_DTYPES else torch.float32


@dataclass(frozen=True, kw_only=True)
class KernelCall:
    """An integer layer as `target(x, *tensors.values(), *literals)`, x being uint8 codes.

    Args:
      target: the operator.
      tensors: packed weight and what else the layer keeps, by role. Weights packed by oneDNN are opaque.
      literals: the rest.
    """

    target: Any
    tensors: Mapping[str, Tensor | None]
    literals: tuple[Any, ...]

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.target(x, *self.tensors.values(), *self.literals)
        return result


def conv2d_call(
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    geometry: Geometry,
    x_shape: Sequence[int] | None,
    output_dtype: torch.dtype,
) -> KernelCall:
    """A convolution by `weight` [O, C / groups, kH, kW] int8.

    Args:
      weight_scale: [O] float32.
      bias: [O] float32.
      x_scale, x_zero_point: of the codes.
      geometry: stride, padding, dilation, groups; padding is by the zero point.
      x_shape: [B, C, H, W] that oneDNN's weight is laid out for.
      output_dtype: one of OUTPUT_DTYPES.
    """
    kernels = native_kernels()
    if kernels is not None:
        stride, padding, dilation, groups = geometry
        sizes = [weight.shape[0], *weight.shape[2:], *stride, *padding, *dilation, groups]
        packed = kernels.pack(weight, weight_scale, bias, x_scale, x_zero_point, groups)
        literals = (x_zero_point, sizes, output_dtype)
        return KernelCall(target=kernels.operator("conv2d"), tensors={"weight": packed}, literals=literals)
    return KernelCall(
        target=qdiff.x86_conv2d.default,
        tensors={
            "weight": prepack_conv2d(weight, weight_scale, *geometry, x_shape),
            "scale": weight_scale,
            "bias": bias,
        },
        literals=(x_scale, x_zero_point, list(weight.shape), *geometry, output_dtype),
    )


def linear_call(
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    output_dtype: torch.dtype,
) -> KernelCall:
    """A linear by `weight` [O, C] int8; arguments as for `conv2d_call`."""
    outputs = weight.shape[0]
    kernels = native_kernels()
    if kernels is not None:
        packed = kernels.pack(weight, weight_scale, bias, x_scale, x_zero_point)
        literals = (outputs, output_dtype)
        return KernelCall(target=kernels.operator("linear"), tensors={"weight": packed}, literals=literals)
    return KernelCall(
        target=qdiff.x86_linear.default,
        tensors={"weight": prepack_linear(weight), "scale": weight_scale, "bias": bias},
        literals=(x_scale, x_zero_point, outputs, output_dtype),
    )


def _unavailable(device: str) -> str | None:
    """Why no int8 kernels can be used on `device`, None if some can."""
    if device != "cpu":
        return f"the model is on {device}; the x86 kernels run on cpu: use .to('cpu')"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"the CPU is {platform.machine()}, want x86_64"
    if native_kernels() is None and (not torch._C._has_mkldnn or not hasattr(torch.ops.onednn, "qconv_pointwise")):
        return "this build of PyTorch has no oneDNN int8 kernels"
    if not known_answers_hold():
        return (
            "oneDNN's int8 kernels saturate on this CPU (no VNNI, or ONEDNN_MAX_CPU_ISA is set below it), so results "
            "would be wrong; qdiff_fx's own are for Linux, a C++ compiler and AVX2 without AMX or AVX-VNNI; use "
            "backend='reference', or the original model in bf16 or float32"
        )
    return None


def known_answers_hold() -> bool:
    """Whether a convolution and a linear of the largest codes come out right.

    Each pair of products, 2 * 255 * 127, exceeds int16: without VNNI oneDNN adds pairs in 16 bits, saturating. Asked
    of the kernels themselves, since torch's capability flags do not know ONEDNN_MAX_CPU_ISA.
    """
    channels = 64
    x = torch.full((1, channels, 4, 4), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    scale = torch.ones(channels, dtype=torch.float32)
    weight = torch.full((channels, channels, 3, 3), 127, dtype=torch.int8)
    geometry: Geometry = ([1, 1], [0, 0], [1, 1], 1)
    conv = conv2d_call(weight, scale, None, 1.0, 0, geometry, list(x.shape), torch.float32)(x)
    linear = linear_call(weight[:, :, 0, 0], scale, None, 1.0, 0, torch.float32)(x[:, :, 0, 0])
    # Exact in float32: 255 * 127 * 64 * 9 = 18,653,760 is even and below 2^25.
    product = 255.0 * 127.0 * channels
    return bool((conv == product * 9).all() and (linear == product).all())


X86 = Backend(name="x86", unavailable=_unavailable)
