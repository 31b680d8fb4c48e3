"""Layers that the cuda backend leaves to the carrier type: by timings, or else by the performance model."""

from __future__ import annotations

import torch
from torch import fx

from qdiff_fx.kernels.cuda_model import carrier_layer, integer_layer
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.lower.carrier_layers import run_in_carrier
from qdiff_fx.passes.lower.cuda_target import layer_work, target_gpu
from qdiff_fx.passes.lower.integer_layers import IntegerLayer, IntegerLayerPass

qdiff = torch.ops.qdiff

PREDICTED_MARGIN = 0.7
"""Without timings the carrier type must be predicted to take at most so much of the integers' time: the model is off by
about a quarter, and a layer on integers has the smaller weight."""


class KeepSlowLayersInCarrier(IntegerLayerPass):
    """A layer that was timed, or else clearly predicted, to be faster in the carrier type runs there, dequantized.

    Left alone: layers that win on integers; every layer under strict=True; without timings, those in float32 (which no
    tensor core multiplies) and all where the interpreter stands in for a GPU; layers whose codes or constants are
    computed otherwise than by a quantize step.
    """

    def check(self, match: IntegerLayer, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        if (reason := super().check(match, graph_module, context)) is not None:
            return reason
        if context.strict:
            return "integer kernels are asked for"
        if match.x.target is not qdiff.quantize.default:
            return f"{match.x.name}: no quantize step"
        return None if _reason(match, graph_module, context) else "wins on integers"

    def rewrite(self, match: IntegerLayer, graph_module: fx.GraphModule, context: PassContext) -> None:
        run_in_carrier(match, graph_module, _reason(match, graph_module, context) or "")


def _reason(match: IntegerLayer, graph_module: fx.GraphModule, context: PassContext) -> str | None:
    """Why the layer is better off in the carrier type, None if it is not."""
    name, gpu = match.node.name, target_gpu(graph_module)
    if name in context.carrier_layers or name in context.kernels:
        return context.carrier_layers.get(name)
    if gpu is None or match.output_dtype == torch.float32:
        return None
    work = layer_work(match)
    integer, carrier = (1e6 * model(work, gpu).predicted for model in (integer_layer, carrier_layer))
    if carrier > PREDICTED_MARGIN * integer:
        return None
    return f"predicted {integer:.1f} us on integers, {carrier:.1f} us in the carrier type"
