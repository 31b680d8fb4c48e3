"""Change the carrier type of a converted graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qdiff_fx.errors import ConversionError, QDiffWarning
from qdiff_fx.graph.edit import LAYER_OPERATORS, create_call, get_tensor, set_tensor
from qdiff_fx.graph.meta import FIXED_DTYPE
from qdiff_fx.graph.propagate import refresh
from qdiff_fx.graph.signature import CallSignature

aten = torch.ops.aten
qdiff = torch.ops.qdiff

FP16_SAFE_MAXIMUM = 16_384.0
"""Largest |x| of an observed tensor that may run in fp16: a quarter of its range, since calibration saw a sample."""

BFLOAT16_KEEPS_DB = 30.0
"""Of a tensor's variance over its own rounding; tensors of trained networks keep over 45 dB."""

_BFLOAT16_ERROR = 2.75e-6
"""Mean relative energy of rounding to 8 significant bits: ulp^2 / 12, mantissas spread evenly in the logarithm."""


def check_carrier(
    dtype: torch.dtype, maxima: Mapping[str, float], offsets: Mapping[str, float], *, stacklevel: int = 3
) -> None:
    """Raise ConversionError if a tensor was observed to be too large for an fp16 carrier.

    Warns of a bfloat16 carrier whose 8 bits go to constants that channels lie around instead of to what varies.

    Args:
      dtype: the carrier type asked for.
      maxima: largest |x| of every observed tensor by its name.
      offsets: energy over variance of the observed tensors, by name.
      stacklevel: of the warning; 3 is the caller of the caller.
    """
    if not dtype.is_floating_point:
        raise ConversionError(f"dtype={dtype}: want a carrier type, torch.float32, torch.bfloat16 or torch.float16")
    worst = max(maxima, key=lambda name: maxima[name], default=None)
    if dtype == torch.float16 and worst is not None and maxima[worst] > FP16_SAFE_MAXIMUM:
        raise ConversionError(
            f"{worst}: |x| reached {maxima[worst]:.3g} in calibration, too much for an fp16 carrier (at most "
            f"{FP16_SAFE_MAXIMUM:,.0f}); use dtype=torch.bfloat16 or torch.float32"
        )
    kept = {name: -10.0 * math.log10(_BFLOAT16_ERROR * ratio) for name, ratio in offsets.items()}
    lost = min(kept, key=lambda name: kept[name], default=None)
    if dtype == torch.bfloat16 and lost is not None and kept[lost] < BFLOAT16_KEEPS_DB:
        warnings.warn(
            f"{lost}: its channels lie around constants, {offsets[lost] ** 0.5:.0f} times what varies; rounding to "
            f"bfloat16 alone leaves {kept[lost]:.0f} dB of it (want {BFLOAT16_KEEPS_DB:.0f}), and each reader adds "
            f"to that; use dtype=torch.float32",
            QDiffWarning,
            stacklevel=stacklevel,
        )


def set_carrier(plan: fx.GraphModule, signature: CallSignature, dtype: torch.dtype) -> CallSignature:
    """Make `dtype` the type of everything in `plan` that is not an integer, a scale or timestep arithmetic.

    Changes `plan` in place and returns its new signature.
    """
    old = signature.input(signature.sample).dtype
    if old == dtype:
        return signature
    float32 = _scale_nodes(plan.graph)
    for node in plan.graph.nodes:
        if node.op == "get_attr" and node not in float32:
            tensor = get_tensor(plan, node.target)
            if tensor.dtype == old:
                cast = tensor.detach().to(dtype)
                set_tensor(plan, str(node.target), nn.Parameter(cast, requires_grad=False))
        elif node.op == "call_function" and not FIXED_DTYPE.get(node):
            node.args = fx.node.map_aggregate(node.args, lambda item: dtype if item == old else item)
            node.kwargs = fx.node.map_aggregate(node.kwargs, lambda item: dtype if item == old else item)
    _cast_into_layers(plan, signature.timestep, dtype)
    plan.graph.lint()
    plan.recompile()
    inputs = tuple(
        replace(item, dtype=dtype) if item.dtype == old and item.name != signature.timestep else item
        for item in signature.inputs
    )
    signature = replace(signature, inputs=inputs)
    refresh(plan, signature)
    return signature


def _scale_nodes(graph: fx.Graph) -> dict[fx.Node, None]:
    """Constants that stay float32: scales, and reciprocals of scales. A bias follows the carrier."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        positions: dict[Any, int] = {
            qdiff.quantize.default: 1,
            qdiff.conv2d.default: 2,
            qdiff.linear.default: 2,
            qdiff.dequantize_weight.default: 1,
        }
        if node.target in positions:
            found[node.args[positions[node.target]]] = None
    return found


def _cast_into_layers(plan: fx.GraphModule, timestep: str | None, dtype: torch.dtype) -> None:
    """Cast what timestep arithmetic hands to a carrier-type layer without a cast of its own."""
    for node in plan.graph.nodes:
        source = node.args[0] if node.target in LAYER_OPERATORS else None
        if isinstance(source, fx.Node) and _stays_float32(source, timestep):
            with plan.graph.inserting_before(node):
                node.update_arg(0, create_call(plan.graph, aten.to.dtype, (source, dtype), like=source))


def _stays_float32(node: fx.Node, timestep: str | None) -> bool:
    pending = [node]
    while pending:
        current = pending.pop()
        if FIXED_DTYPE.get(current) or (current.op == "placeholder" and current.name == timestep):
            return True
        if current.op == "call_function" and current.target not in (aten.to.dtype, *LAYER_OPERATORS):
            if not isinstance(current.meta.get("val"), Tensor) or str(current.target).startswith("qdiff"):
                continue
            pending.extend(item for item in current.all_input_nodes if isinstance(item.meta.get("val"), Tensor))
    return False
