"""What rounding weights to nearest takes from the mean of each output channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from qdiff_fx.allocation.input_means import mean_output
from qdiff_fx.fake_quantize import WeightQuantizer
from qdiff_fx.graph.edit import get_tensor, layer_call


@torch.no_grad()
def bias_corrections(graph_module: fx.GraphModule, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """E[layer(x, W)] - E[layer(x, W')] by output channel, [C_out], of every layer whose weight is rounded to nearest.

    The residual stream's channels have means, so rounding errors of a row of the weight add to a constant, the same at
    every pixel and every sampling step (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", section 4.2; here with the means of full-precision inputs, padding included).

    Args:
      means: of the layers' inputs, from `input_means`.

    Returns: by the layer's node. Learned rounding is left out: its loss has seen the means.
    """
    corrections = {}
    for node in graph_module.graph.nodes:
        call = layer_call(node)
        if call is None or node.name not in means or call.weight.op != "call_module":
            continue  # not a layer, or its weight went to the carrier type
        quantizer = graph_module.get_submodule(str(call.weight.target))
        assert isinstance(quantizer, WeightQuantizer)
        if quantizer.round_up is None:
            weight = get_tensor(graph_module, call.weight_source.target).detach()
            lost = weight.double() - quantizer.quantized(weight).double()
            corrections[node.name] = mean_output(lost, means[node.name]).to(weight)
    return corrections
