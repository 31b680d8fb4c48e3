"""Run a prepared graph with something of one's own in the place of its quantizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.fake_quantize import ActivationQuantizer, AttentionQuantizer, WeightQuantizer
from qdiff_fx.graph.signature import CallSignature


class Probe(fx.Interpreter):
    """Interprets a prepared graph; layer inputs and weights pass through the callbacks instead of being quantized.

    Args:
      on_weight: (target, quantizer, weight) -> the weight that the layer uses.
      on_input: (target, quantizer, activation) -> the activation that the layer reads.
      on_attention: (target, quantizer, args, kwargs) -> the attention's output; None runs it as it is.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        *,
        on_weight: Callable[[str, WeightQuantizer, Tensor], Tensor],
        on_input: Callable[[str, ActivationQuantizer, Tensor], Tensor],
        on_attention: Callable[[str, AttentionQuantizer, tuple[Any, ...], dict[str, Any]], Tensor] | None = None,
    ) -> None:
        super().__init__(graph_module)
        self.on_weight, self.on_input, self.on_attention = on_weight, on_input, on_attention

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Divert quantizer calls; everything else runs as it is."""
        module = self.fetch_attr(target)
        if isinstance(module, WeightQuantizer):
            return self.on_weight(str(target), module, args[0])
        if isinstance(module, ActivationQuantizer):
            return self.on_input(str(target), module, args[0])
        if isinstance(module, AttentionQuantizer) and self.on_attention is not None:
            return self.on_attention(str(target), module, args, kwargs)
        return super().call_module(target, args, kwargs)


def spread_rows(data: CalibrationSet, count: int, seed: int) -> Tensor:
    """Indices of `count` rows, evenly over the timesteps of `data`, [count] int64; all rows if there are fewer."""
    if count >= len(data):
        return torch.arange(len(data))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)
    by_timestep = order[torch.argsort(data.row_timesteps[order], stable=True)]
    # Equal steps through the rows in timestep order take an even share of each.
    return by_timestep[torch.linspace(0, len(data) - 1, count).round().to(torch.int64)]


def flat_inputs(
    data: CalibrationSet, rows: Tensor, signature: CallSignature, device: torch.device
) -> tuple[Tensor, ...]:
    """The graph's inputs for mixed rows of `data`."""
    args, kwargs = data.gather(rows)
    return tuple(value.to(device) for value in signature.flatten(args, kwargs))
