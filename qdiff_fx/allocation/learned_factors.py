"""Refine a channel factor by gradient descent on the output error of the layers that read the tensor.

The closed form max|x_c|^a / max|W_c|^(1 - a) balances ranges; what counts is the layers' output. As in learned
equivalent scaling (DMQ, ICCV 2025) log m is learned, straight through both roundings. Departures: before rounding is
learned, one tensor at a time, on the local error that candidates are judged by; shifts stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from qdiff_fx.allocation.factor_errors import WEIGHT_EMPHASIS, Reader, layer_output, relative_error
from qdiff_fx.fake_quantize import ActivationQuantizer, WeightQuantizer
from qdiff_fx.numerics.affine import QParams, along_axis, fake_quantize

BATCH_ROWS = 16
LEARNING_RATE = 0.02
"""Of log m, Adam: a factor moves by about 2 % a step."""


def refine_factor(
    factor: Tensor,
    quantizer: ActivationQuantizer,
    qparams: QParams,
    readers: Sequence[Reader],
    fitted: Sequence[WeightQuantizer],
    x: Tensor,
    iterations: int,
    *,
    seed: int = 0,
) -> Tensor:
    """`factor` [C] after `iterations` steps of Adam on its logarithm, with geometric mean 1; nothing else changes.

    Args:
      qparams: grid of x / m, kept while m moves: whoever takes the result fits its own.
      fitted: the readers' weight quantizers under `factor`; likewise.
      x: the tensor on all samples; every step takes `BATCH_ROWS` of them, drawn by `seed`.
    """
    start = torch.log(factor)
    offset = torch.zeros_like(start).requires_grad_(True)
    optimizer = torch.optim.Adam([offset], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    moving = [copy.deepcopy(item) for item in fitted]
    axis = quantizer.channel_axis % x.ndim
    for _ in range(iterations):
        part = x[torch.randperm(len(x), generator=generator)[:BATCH_ROWS].to(x.device)]
        targets = [layer_output(reader.call, part, reader.weight) for reader in readers]
        with torch.enable_grad():
            moved = _with_mean_one(start + offset)
            step = along_axis(moved, x.ndim, axis)
            rounded = fake_quantize(part, qparams.scale, qparams.zero_point, quantizer.spec, channel_factor=step)
            weights = []
            for item, reader in zip(moving, readers, strict=True):
                item.channel_factor = moved
                weights.append(item.quantized(reader.weight.detach()))
            joint = relative_error(readers, targets, rounded, weights)
            loss = joint + (WEIGHT_EMPHASIS - 1.0) * relative_error(readers, targets, part, weights)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _with_mean_one((start + offset).detach())


def _with_mean_one(logarithm: Tensor) -> Tensor:
    return torch.exp(logarithm - logarithm.mean())
