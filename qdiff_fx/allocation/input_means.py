"""The mean of what each element of a row of a layer's weight is multiplied by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.allocation.factor_errors import layer_output
from qdiff_fx.allocation.probe import Probe, flat_inputs, spread_rows
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.fake_quantize import QuantizerMode, preserved_modes, set_mode
from qdiff_fx.graph.edit import LayerCall, layer_call
from qdiff_fx.graph.memory import row_memory, rows_within
from qdiff_fx.graph.signature import CallSignature


@torch.no_grad()
def input_means(
    graph_module: fx.GraphModule,
    signature: CallSignature,
    data: CalibrationSet,
    *,
    samples: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool | None = False,
) -> dict[str, Tensor]:
    """Means over rows and output positions, padding included, of the inputs of every layer whose weight is quantized.

    Args:
      samples: rows, evenly over the timesteps; one full-precision forward pass each.
      batch_size: rows a forward pass, fewer where so many would not fit.

    Returns: float64 [groups, C_in / groups, ...], the rest as the weight's, by the layer's node. A weight's mean output
      is its product with them, see `mean_output`.
    """
    layers = {node.name: call for node in graph_module.graph.nodes if (call := layer_call(node)) is not None}
    quantized = {name: call for name, call in layers.items() if call.weight.op == "call_module"}
    parameter = next(graph_module.parameters(), None)
    if not quantized or parameter is None:
        return {}
    sums = _Sums(graph_module, quantized)
    rows = spread_rows(data, samples, seed)
    memory = row_memory(graph_module, flat_inputs(data, rows[:1], signature, parameter.device))
    batch_size = rows_within(memory.forward, batch_size)
    with preserved_modes(graph_module), progress_bar("input means", total=len(rows), progress=progress) as bar:
        set_mode(graph_module, QuantizerMode.PASS)
        for part in torch.split(rows, batch_size):
            sums.run(*flat_inputs(data, part, signature, parameter.device))
            bar.update(len(part))
    return {name: total / sums.counts[name] for name, total in sums.totals.items()}


def mean_output(weight: Tensor, mean: Tensor) -> Tensor:
    """Mean output, without bias, of a layer with this weight [C_out, C_in / groups, ...]; float64 [C_out]."""
    groups = len(mean)
    by_group = weight.double().reshape(groups, len(weight) // groups, -1) * mean.reshape(groups, 1, -1)
    return by_group.sum(dim=-1).reshape(-1)


def centred(gradient: Tensor, output_gradient: Tensor, mean: Tensor) -> Tensor:
    """`gradient` of a weight less what a change of the layer's mean output has in it.

    Args:
      gradient: [C_out, C_in / groups, ...], summed over rows and positions.
      output_gradient: [C_out], the same sum of the output's gradient: the bias's gradient.
    """
    groups = len(mean)
    through_mean = output_gradient.double().reshape(groups, -1, 1) * mean.reshape(groups, 1, -1)
    return gradient.double() - through_mean.reshape(gradient.shape)


class _Sums(Probe):
    """Adds up the inputs of `layers` over calls."""

    def __init__(self, graph_module: fx.GraphModule, layers: Mapping[str, LayerCall]) -> None:
        super().__init__(graph_module, on_weight=lambda _, __, weight: weight, on_input=lambda _, __, x: x)
        self.layers = layers
        self.totals: dict[str, Tensor] = {}
        self.counts = dict.fromkeys(layers, 0)

    def run_node(self, n: fx.Node) -> Any:
        """Before each layer itself, run it with one output channel a group: the gradient of its sum is wanted."""
        if (call := self.layers.get(n.name)) is not None:
            x, weight = self.env[call.input], self.env[call.weight]
            row = weight.new_zeros((call.groups, *weight.shape[1:])).requires_grad_(True)
            with torch.enable_grad():
                output = layer_output(call, x.detach(), row)
                (gradient,) = torch.autograd.grad(output.sum(), row)
            self.totals[n.name] = self.totals.get(n.name, 0.0) + gradient.double()
            self.counts[n.name] += output.numel() // call.groups
        return super().run_node(n)
