"""The operators of a graph lowered to the cuda backend: opaque to compilers, with fake kernels.

Activations are signed codes: those of the plan less 128. The constants of a layer are what `cuda_weights` makes;
`scale` [O] float32 is s_x * s_w. A layer's output is

    y = (sum q_x w - correction) * scale + bias + embedding + residual, then SiLU if asked, in float32,

cast to `output_dtype`, or where `inv_scale` [O] is given, quantized to int8 by requantize = (zero point, qmin, qmax).
They run on CUDA, and on the CPU under Triton's interpreter only. Registered by `Library.impl`, as x86's are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qdiff_fx.errors import BackendError
from qdiff_fx.kernels.empty_image import empty_image

_LIBRARY: Any = torch.library.Library("qdiff", "FRAGMENT")  # type: ignore[no-untyped-call]
_CONSTANTS = (
    "Tensor scale, Tensor correction, Tensor? weight_zero_point, Tensor? channel_shift, Tensor? bias, "
    "Tensor? embedding, Tensor? inv_scale"
)
_LIBRARY.define(
    f"cuda_conv2d(Tensor x, Tensor weight, {_CONSTANTS}, Tensor? residual, int[] requantize, bool silu, "
    "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, int[] tile, "
    "ScalarType output_dtype) -> Tensor"
)
_LIBRARY.define(
    f"cuda_linear(Tensor x, Tensor weight, {_CONSTANTS}, Tensor? residual, int[] requantize, bool silu, "
    "int[] weight_shape, str kernel, int[] tile, ScalarType output_dtype) -> Tensor"
)
_LIBRARY.define(
    "cuda_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float score_scale, "
    "float output_scale, int[] zero_points, int qmax, int[] tile, ScalarType output_dtype) -> Tensor"
)


def _launch(x: Tensor) -> Any:
    """The launchers, imported at the first call: triton is an optional dependency."""
    from qdiff_fx.kernels.triton_kernels import launch

    if x.device.type != "cuda" and not launch.interpreted():
        raise BackendError(
            f"a model lowered to cuda got a tensor on {x.device}; move it with .to('cuda'), or the model by .to('cpu')"
        )
    return launch


def _conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    weight_zero_point: Tensor | None,
    channel_shift: Tensor | None,
    bias: Tensor | None,
    embedding: Tensor | None,
    inv_scale: Tensor | None,
    residual: Tensor | None,
    requantize: Sequence[int],
    silu: bool,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tile: Sequence[int],
    output_dtype: torch.dtype,
) -> Tensor:
    output = empty_image(x, weight_shape, stride, padding, dilation, output_dtype)
    constants = (scale, correction, weight_zero_point, channel_shift, bias, _rows(embedding), inv_scale)
    geometry = (stride, padding, dilation)
    _launch(x).conv2d(
        x, weight, constants, residual, output, requantize, silu, weight_shape, geometry, groups, tile
    )  # fmt: skip
    return output


def _conv2d_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    weight_zero_point: Tensor | None,
    channel_shift: Tensor | None,
    bias: Tensor | None,
    embedding: Tensor | None,
    inv_scale: Tensor | None,
    residual: Tensor | None,
    requantize: Sequence[int],
    silu: bool,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tile: Sequence[int],
    output_dtype: torch.dtype,
) -> Tensor:
    return empty_image(x, weight_shape, stride, padding, dilation, output_dtype)


def _linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    weight_zero_point: Tensor | None,
    channel_shift: Tensor | None,
    bias: Tensor | None,
    embedding: Tensor | None,
    inv_scale: Tensor | None,
    residual: Tensor | None,
    requantize: Sequence[int],
    silu: bool,
    weight_shape: Sequence[int],
    kernel: str,
    tile: Sequence[int],
    output_dtype: torch.dtype,
) -> Tensor:
    output = x.new_empty((*x.shape[:-1], weight_shape[0]), dtype=output_dtype)
    constants = (scale, correction, weight_zero_point, channel_shift, bias, embedding, inv_scale)
    if kernel == "int_mm":
        _launch(x).int_mm_linear(x, weight, constants, residual, output, requantize, silu)
    else:
        _launch(x).linear(x, weight, constants, residual, output, requantize, silu, tile)
    return output


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    weight_zero_point: Tensor | None,
    channel_shift: Tensor | None,
    bias: Tensor | None,
    embedding: Tensor | None,
    inv_scale: Tensor | None,
    residual: Tensor | None,
    requantize: Sequence[int],
    silu: bool,
    weight_shape: Sequence[int],
    kernel: str,
    tile: Sequence[int],
    output_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_shape[0]), dtype=output_dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    score_scale: float,
    output_scale: float,
    zero_points: Sequence[int],
    qmax: int,
    tile: Sequence[int],
    output_dtype: torch.dtype,
) -> Tensor:
    output = query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=output_dtype)
    _launch(query).fused_attention(
        query, key, value, mask, is_causal, score_scale, output_scale, zero_points, qmax, output, tile
    )
    return output


def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    score_scale: float,
    output_scale: float,
    zero_points: Sequence[int],
    qmax: int,
    tile: Sequence[int],
    output_dtype: torch.dtype,
) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=output_dtype)


def _rows(embedding: Tensor | None) -> Tensor | None:
    """An embedding whose rows are contiguous each; a slice of merged layers' output is one."""
    return embedding if embedding is None or embedding.stride(1) == 1 else embedding.contiguous()


for _name, _kernel, _fake in (
    ("cuda_conv2d", _conv2d, _conv2d_fake),
    ("cuda_linear", _linear, _linear_fake),
    ("cuda_attention", _attention, _attention_fake),
):
    for _key in ("CUDA", "CPU"):
        _LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"qdiff::{_name}", _fake, lib=_LIBRARY)
