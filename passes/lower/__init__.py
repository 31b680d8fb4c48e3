"""LOWER passes: from backend-neutral operators to one backend's kernels."""

from collections.abc import Mapping

from qdiff_fx.passes.base import GraphPass
from qdiff_fx.passes.lower.qdq import QuantizeDequantizeLayers, QuantizeDequantizeWeights
from qdiff_fx.passes.lower.quantize import LowerQuantize
from qdiff_fx.passes.lower.x86_attention import DropAttentionQuantizers
from qdiff_fx.passes.lower.x86_layers import LowerX86Layers
from qdiff_fx.passes.lower.x86_weights import DequantizeWeights

LOWER: Mapping[str, tuple[GraphPass, ...]] = {
    "reference": (),
    "qdq": (
        QuantizeDequantizeLayers(),
        QuantizeDequantizeWeights(),
        DropAttentionQuantizers("the standard form has no operator for quantized attention"),
    ),
    "x86": (LowerX86Layers(), LowerQuantize(), DequantizeWeights(), DropAttentionQuantizers()),
}
"""Ordered passes of every backend; the reference runs the plan's operators as they are."""
