"""Layers that the performance model leaves to the carrier type."""

from __future__ import annotations

import torch
from torch import fx

from qdiff_fx.kernels.cuda_model import carrier_layer, integer_layer
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.lower.carrier_layers import run_in_carrier
from qdiff_fx.passes.lower.cuda_target import layer_work, target_gpu
from qdiff_fx.passes.lower.integer_layers import IntegerLayer, IntegerLayerPass

qdiff = torch.ops.qdiff


class KeepSlowLayersInCarrier(IntegerLayerPass):
    """A layer that the model finds faster in the carrier type runs there, on its weight dequantized once.

    Left alone: layers that are predicted to win on integers; every layer under strict=True, in float32 (which no
    tensor core multiplies), or where the interpreter stands in for a GPU; layers whose codes or constants are computed
    otherwise than by a quantize step.
    """

    def check(self, match: IntegerLayer, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        if (reason := super().check(match, graph_module, context)) is not None:
            return reason
        gpu = target_gpu(graph_module)
        if context.strict or gpu is None or match.output_dtype == torch.float32:
            return "integer kernels are asked for"
        if match.x.target is not qdiff.quantize.default:
            return f"{match.x.name}: no quantize step"
        work = layer_work(match)
        if integer_layer(work, gpu).predicted <= carrier_layer(work, gpu).predicted:
            return "predicted to win on integers"
        return None

    def rewrite(self, match: IntegerLayer, graph_module: fx.GraphModule, context: PassContext) -> None:
        gpu, work = target_gpu(graph_module), layer_work(match)
        assert gpu is not None
        times = (1e6 * model(work, gpu).predicted for model in (integer_layer, carrier_layer))
        reason = "predicted {:.1f} us on integers, {:.1f} us in the carrier type".format(*times)
        run_in_carrier(match, graph_module, reason)
