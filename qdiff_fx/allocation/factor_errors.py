"""What the layers that read a quantized tensor make of it: the errors that channel factors are judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdiff_fx.fake_quantize import WeightQuantizer
from qdiff_fx.graph.edit import LayerCall

WEIGHT_EMPHASIS = 8.0
"""A weight's error acts alike at every sampling step and adds up, an input's differs and averages out: by end-point
PSNR W8 alone costs 2 dB more than A8 alone though its SQNR is 8 dB better (docs/decisions/022)."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A layer that reads the quantized tensor.

    Args:
      centred: whether its bias will make up for the mean of its error, so that only what varies counts.
    """

    call: LayerCall
    weight: Tensor
    quantizer: WeightQuantizer
    centred: bool = False


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative output errors of the layers that read a tensor, summed over them.

    Args:
      joint: with input and weight quantized.
      weight: with the weight quantized alone.
    """

    joint: float
    weight: float

    @classmethod
    def of(
        cls,
        readers: Sequence[Reader],
        targets: Sequence[Tensor],
        x: Tensor,
        rounded: Tensor,
        quantizers: Sequence[WeightQuantizer],
    ) -> Errors:
        """Measure both for the input `x`, its rounded form and the readers' weights as `quantizers` round them."""
        weights = [item.quantized(reader.weight) for item, reader in zip(quantizers, readers, strict=True)]
        return cls(
            joint=float(relative_error(readers, targets, rounded, weights)),
            weight=float(relative_error(readers, targets, x, weights)),
        )

    @property
    def score(self) -> float:
        """The joint error with its weight part emphasised."""
        return self.joint + (WEIGHT_EMPHASIS - 1.0) * self.weight


def input_channel_maxima(reader: Reader) -> Tensor:
    """max |W| by input channel, [C_in]; in a grouped convolution the groups' channels follow each other."""
    weight, groups = reader.weight.detach(), reader.call.groups
    by_channel = weight.abs().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return by_channel.amax(dim=(1, 3)).reshape(-1).to(torch.float32)


def relative_error(
    readers: Sequence[Reader], targets: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor]
) -> Tensor:
    """Sum over the layers of the mean over rows of ||y' - y||^2 / ||y||^2: every noise level counts alike.

    A float64 scalar, differentiable in `x` and `weights`.
    """
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for reader, target, weight in zip(readers, targets, weights, strict=True):
        error = layer_output(reader.call, x, weight) - target
        if reader.centred:
            error = error - error.mean(dim=output_axes(reader.call, error), keepdim=True)
        total = total + (_row_energies(error) / _row_energies(target).clamp(min=1e-30)).mean()
    return total


def _row_energies(values: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.float64)
    return norms.square()


def output_axes(call: LayerCall, output: Tensor) -> list[int]:
    """Rows and positions of a layer's output: every axis but the channels'."""
    return [axis for axis in range(output.ndim) if axis != call.channel_axis % output.ndim]


def layer_output(call: LayerCall, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's output without its bias."""
    operator: Any = call.node.target
    result: Tensor = operator(x, weight, None, *call.node.args[3:], **_without_bias(call.node.kwargs))
    return result


def _without_bias(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "bias"}
