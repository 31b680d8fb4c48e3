"""What rounding weights to nearest takes from the mean of each output channel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.allocation.factor_errors import layer_output
from qdiff_fx.allocation.probe import Probe, flat_inputs, spread_rows
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.fake_quantize import QuantizerMode, WeightQuantizer, preserved_modes, set_mode
from qdiff_fx.graph.edit import LayerCall, get_tensor, layer_call
from qdiff_fx.graph.memory import row_memory, rows_within
from qdiff_fx.graph.signature import CallSignature


@torch.no_grad()
def bias_corrections(
    graph_module: fx.GraphModule,
    signature: CallSignature,
    data: CalibrationSet,
    *,
    samples: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool | None = False,
) -> dict[str, Tensor]:
    """E[layer(x, W)] - E[layer(x, W')] by output channel, [C_out], of every layer whose weight is rounded to nearest.

    The residual stream's channels have means, so rounding errors of a row of the weight add to a constant, the same at
    every pixel and every sampling step (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", section 4.2; here with the means of full-precision inputs, padding included).

    Args:
      samples: rows, evenly over the timesteps; one forward pass each.
      batch_size: rows a forward pass, fewer where so many would not fit.

    Returns: by the layer's node. Learned rounding is left out: its loss has seen the means.
    """
    rounded = {node.name: weight for node in graph_module.graph.nodes if (weight := _rounded(graph_module, node))}
    if not rounded:
        return {}
    means = _InputMeans(graph_module, rounded)
    device = next(iter(rounded.values()))[1].device
    rows = spread_rows(data, samples, seed)
    batch_size = rows_within(
        row_memory(graph_module, flat_inputs(data, rows[:1], signature, device)).forward, batch_size
    )
    with (
        preserved_modes(graph_module),
        progress_bar("bias correction", total=len(rows), progress=progress) as bar,
    ):
        set_mode(graph_module, QuantizerMode.PASS)
        for part in torch.split(rows, batch_size):
            means.run(*flat_inputs(data, part, signature, device))
            bar.update(len(part))
    return {
        name: means.through(name, weight.double() - quantizer.quantized(weight).double()).to(weight)
        for name, (quantizer, weight) in rounded.items()
    }


class _InputMeans(Probe):
    """Adds up, for each of the named layers, what every element of a row of its weight is multiplied by."""

    def __init__(self, graph_module: fx.GraphModule, layers: Iterable[str]) -> None:
        super().__init__(graph_module, on_weight=lambda _, __, weight: weight, on_input=lambda _, __, x: x)
        self.sums: dict[str, Tensor | None] = dict.fromkeys(layers)
        self.counts = dict.fromkeys(layers, 0)

    def run_node(self, n: fx.Node) -> Any:
        """Also run each layer, before itself, with one output channel a group: the gradient of its sum is wanted."""
        call = layer_call(n) if n.name in self.sums else None
        if call is not None:
            self._add(n.name, call, self.env[call.input], self.env[call.weight])
        return super().run_node(n)

    def _add(self, name: str, call: LayerCall, x: Tensor, weight: Tensor) -> None:
        row = weight.new_zeros((call.groups, *weight.shape[1:])).requires_grad_(True)
        with torch.enable_grad():
            output = layer_output(call, x.detach(), row)
            (gradient,) = torch.autograd.grad(output.sum(), row)
        before = self.sums[name]
        self.sums[name] = gradient.double() if before is None else before + gradient
        self.counts[name] += output.numel() // call.groups

    def through(self, name: str, weight: Tensor) -> Tensor:
        """Mean output of a layer with this weight [C_out, C_in / groups, ...], float64 [C_out]."""
        total = self.sums[name]
        assert total is not None
        groups = len(total)
        by_group = weight.reshape(groups, len(weight) // groups, -1) * total.reshape(groups, 1, -1)
        return by_group.sum(dim=-1).reshape(-1) / self.counts[name]


def _rounded(graph_module: fx.GraphModule, node: fx.Node) -> tuple[WeightQuantizer, Tensor] | None:
    """Quantizer and weight of a layer whose weight is rounded to nearest."""
    call = layer_call(node)
    if call is None or call.weight.op != "call_module":
        return None
    quantizer, source = graph_module.get_submodule(str(call.weight.target)), call.weight.args[0]
    if not isinstance(quantizer, WeightQuantizer) or quantizer.round_up is not None or not isinstance(source, fx.Node):
        return None
    return quantizer, get_tensor(graph_module, source.target).detach()
