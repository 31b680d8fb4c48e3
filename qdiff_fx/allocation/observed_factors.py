"""Channel factors without calibration data: from the channel maxima that a prepared model has seen in a sampler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qdiff_fx.allocation.channel_factors import input_nodes, readers_of
from qdiff_fx.allocation.factor_errors import Reader, input_channel_maxima
from qdiff_fx.allocation.factor_search import install_factor, smoothing_factor
from qdiff_fx.fake_quantize import ActivationQuantizer, WeightQuantizer
from qdiff_fx.graph.meta import LAYER
from qdiff_fx.numerics.affine import QParams, qparams_from_range
from qdiff_fx.numerics.weights import expand_input_channels

EXPONENT = 0.5
REDRAWN_GAIN_DB = 6.0
"""What a factor must be predicted to gain where it rounds weights of fewer than 8 bits anew. The prediction knows
maxima, not distributions, and a range search that clips is given up (docs/decisions/073)."""


@torch.no_grad()
def equalize_from_maxima(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Fold max|x_c|^0.5 / max|W_c|^0.5 where it lowers the predicted error; names of the layers' inputs.

    Where a reader has a weight of fewer than 8 bits, it must lower it by `REDRAWN_GAIN_DB`.

    For each layer the error of a uniform grid is predicted from maxima alone: steps of (s_x m_c)^2 / 12 through the
    weight's column, and the rounding of the weight, taken exactly, under inputs of a third of the channel's maximum
    (uniform values have a variance of max^2 / 3). Quantizers must be fitted.

    Left alone: readers that cannot take a factor (shared weights), tensors that already have one.
    """
    changed: list[str] = []
    for node in input_nodes(graph_module):
        quantizer = graph_module.get_submodule(str(node.target))
        assert isinstance(quantizer, ActivationQuantizer)
        readers = readers_of(graph_module, node)
        maxima = quantizer.statistics.channel_maxima
        if not readers or maxima.numel() == 0 or quantizer.channel_factor is not None:
            continue
        maxima = maxima.to(readers[0].weight.device)
        factor = smoothing_factor(
            maxima, torch.stack([input_channel_maxima(reader) for reader in readers]).amax(dim=0), EXPONENT
        )
        qparams = _range_under(quantizer, maxima, factor)
        fitted = [_fitted(reader, factor) for reader in readers]
        ones = torch.ones_like(factor)
        plain = _predicted(readers, [reader.quantizer for reader in readers], maxima, quantizer.scale * ones)
        equalised = _predicted(readers, fitted, maxima, qparams.scale * factor)
        redrawn = any(reader.quantizer.spec.bits < 8 for reader in readers)
        if equalised * 10.0 ** (REDRAWN_GAIN_DB * redrawn / 10.0) >= plain:
            continue
        install_factor(quantizer, factor, qparams, readers, fitted)
        changed.extend(LAYER.require(reader.call.node).name for reader in readers)
    return tuple(changed)


def _range_under(quantizer: ActivationQuantizer, maxima: Tensor, factor: Tensor) -> QParams:
    """The min-max grid of x / m; its lower end is what the observed minimum can become at most."""
    highest = (maxima / factor).max()
    smallest = quantizer.observer.minimum.to(factor.device).min() / factor.min()
    return qparams_from_range(torch.maximum(-highest, smallest).clamp(max=0.0), highest, quantizer.spec)


def _fitted(reader: Reader, factor: Tensor) -> WeightQuantizer:
    fitted = reader.quantizer.unfitted()
    fitted.channel_factor = factor
    fitted.fit(reader.weight)
    return fitted


def _predicted(
    readers: Sequence[Reader], quantizers: Sequence[WeightQuantizer], maxima: Tensor, steps: Tensor
) -> float:
    """Predicted error energy an output position, summed over the layers, each relative to its signal's."""
    total = 0.0
    for reader, quantizer in zip(readers, quantizers, strict=True):
        weight, groups = reader.weight.detach(), reader.call.groups
        inputs = expand_input_channels(maxima, weight.shape, groups).double().square() / 3.0
        rounding = expand_input_channels(steps, weight.shape, groups).double().square() / 12.0
        error = (quantizer.quantized(weight).double() - weight.double()).square()
        signal = (inputs * weight.double().square()).sum().clamp(min=1e-30)
        total += float(((inputs * error) + rounding * weight.double().square()).sum() / signal)
    return total
