"""Which operator runs an integer layer on x86, and what it is called with: our own VNNI kernels, or oneDNN's.

Our own where the CPU has AVX512-VNNI and no AMX, oneDNN's elsewhere (docs/decisions/012).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdiff_fx.kernels.x86 import prepack_conv2d, prepack_linear
from qdiff_fx.kernels.x86_vnni import pack_vnni, vnni_available

qdiff = torch.ops.qdiff
Geometry = tuple[list[int], list[int], list[int], int]
"""Stride, padding, dilation and groups."""


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
    if vnni_available():
        stride, padding, dilation, groups = geometry
        sizes = [weight.shape[0], *weight.shape[2:], *stride, *padding, *dilation, groups]
        packed = _pack_groups(weight, weight_scale, bias, x_scale, x_zero_point, groups)
        literals = (x_zero_point, sizes, output_dtype)
        return KernelCall(target=qdiff.vnni_conv2d.default, tensors={"weight": packed}, literals=literals)
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
    if vnni_available():
        packed = _pack_groups(weight, weight_scale, bias, x_scale, x_zero_point, 1)
        literals = (outputs, output_dtype)
        return KernelCall(target=qdiff.vnni_linear.default, tensors={"weight": packed}, literals=literals)
    return KernelCall(
        target=qdiff.x86_linear.default,
        tensors={"weight": prepack_linear(weight), "scale": weight_scale, "bias": bias},
        literals=(x_scale, x_zero_point, outputs, output_dtype),
    )


def _pack_groups(
    weight: Tensor, weight_scale: Tensor, bias: Tensor | None, x_scale: float, x_zero_point: int, groups: int
) -> Tensor:
    offset = -x_zero_point * weight.flatten(1).sum(1, dtype=torch.int32)
    added = torch.zeros_like(weight_scale) if bias is None else bias
    tensors = (weight, offset, weight_scale * x_scale, added)
    parts = [pack_vnni(*part) for part in zip(*(tensor.chunk(groups) for tensor in tensors), strict=True)]
    return parts[0] if groups == 1 else torch.cat(parts)
