"""Distances between a reference and its approximation, in decibels; sums are float64."""

from math import inf, isfinite, log10

import torch
from jaxtyping import Float
from torch import Tensor

from qdiff_fx.errors import InputError


def sqnr_db(reference: Float[Tensor, "..."], approximation: Float[Tensor, "..."]) -> float:
    """Signal-to-quantization-noise ratio, 10 log10(sum reference^2 / sum (reference - approximation)^2).

    inf where both are equal, -inf where only the reference is all zero, NaN where a value is NaN.
    Raises: InputError if the shapes differ.
    """
    noise = _squared_error(reference, approximation)
    signal = float(reference.to(torch.float64).square().sum())
    return _ratio_db(signal, noise)


def psnr_db(reference: Float[Tensor, "..."], approximation: Float[Tensor, "..."], data_range: int | float) -> float:
    """Peak signal-to-noise ratio, 10 log10(data_range^2 / mean (reference - approximation)^2).

    Args:
      reference, approximation: of one shape.
      data_range: distance of the largest from the smallest possible value, e.g. 2 for images in [-1, 1].

    Raises:
      InputError: if the shapes differ, the tensors are empty or `data_range` is not positive.
    """
    if not data_range > 0 or not reference.numel():
        raise InputError(f"data_range={data_range}, {reference.numel()} values: want a positive range and some values")
    return _ratio_db(data_range**2, _squared_error(reference, approximation) / reference.numel())


def finite_or_none(decibels: float) -> float | None:
    """For JSON, which has no infinity: None stands for equal signals."""
    return decibels if isfinite(decibels) else None


def _squared_error(reference: Tensor, approximation: Tensor) -> float:
    if reference.shape != approximation.shape:
        raise InputError(f"shapes {tuple(reference.shape)} and {tuple(approximation.shape)}: want the same")
    return float((reference.to(torch.float64) - approximation.to(torch.float64)).square().sum())


def _ratio_db(signal: float, noise: float) -> float:
    if noise == 0.0:
        return inf
    if signal == 0.0:
        return -inf
    return 10.0 * (log10(signal) - log10(noise))
