"""LOWER passes: from backend-neutral operators to one backend's kernels."""

from collections.abc import Mapping

from qdiff_fx.passes.base import GraphPass
from qdiff_fx.passes.lower.carrier_attention import DropAttentionQuantizers
from qdiff_fx.passes.lower.carrier_layers import KeepChosenLayersInCarrier
from qdiff_fx.passes.lower.carrier_weights import DequantizeWeights
from qdiff_fx.passes.lower.cuda_attention import LowerCudaAttention
from qdiff_fx.passes.lower.cuda_carrier import KeepSlowLayersInCarrier
from qdiff_fx.passes.lower.cuda_epilogue import FuseCudaEpilogues
from qdiff_fx.passes.lower.cuda_layers import LowerCudaLayers
from qdiff_fx.passes.lower.merged_linears import MergeStoredLinears
from qdiff_fx.passes.lower.openvino import RunByOpenVINO
from qdiff_fx.passes.lower.qdq import QuantizeDequantizeLayers, QuantizeDequantizeWeights
from qdiff_fx.passes.lower.quantize import LowerQuantize
from qdiff_fx.passes.lower.shared_steps import ShareQuantizeSteps
from qdiff_fx.passes.lower.signed_codes import CancelSignChanges
from qdiff_fx.passes.lower.x86_attention import LowerX86Attention
from qdiff_fx.passes.lower.x86_layers import LowerX86Layers
from qdiff_fx.passes.lower.x86_norms import NormalizeByChannel
from qdiff_fx.passes.lower.x86_siblings import MergeLinears

LOWER: Mapping[str, tuple[GraphPass, ...]] = {
    "reference": (),
    "qdq": (
        QuantizeDequantizeLayers(),
        QuantizeDequantizeWeights(),
        DropAttentionQuantizers("the standard form has no operator for quantized attention"),
    ),
    "x86": (
        ShareQuantizeSteps(),
        KeepChosenLayersInCarrier(),
        MergeLinears(),
        LowerX86Layers(),
        LowerX86Attention(),
        NormalizeByChannel(),
        LowerQuantize(),
        DequantizeWeights(),
    ),
    "openvino": (
        DequantizeWeights(),
        DropAttentionQuantizers("OpenVINO has no int8 attention kernel"),
        RunByOpenVINO(),
    ),
    "cuda": (
        ShareQuantizeSteps(),
        MergeStoredLinears(),
        KeepSlowLayersInCarrier(),
        LowerCudaAttention(),
        LowerCudaLayers(),
        FuseCudaEpilogues(),
        LowerQuantize(signed=True),
        CancelSignChanges(),
        DequantizeWeights(),
    ),
}
"""Ordered passes of every backend; the reference runs the plan's operators as they are."""
