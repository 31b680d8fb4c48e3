"""Attention with quantized operands and probabilities, as every backend must compute it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qdiff_fx.numerics.affine import fake_quantize
from qdiff_fx.numerics.spec import QuantSpec


def attention_probabilities(
    scores: Float[Tensor, "*batch L S"],
    mask: Float[Tensor, "..."] | Bool[Tensor, "..."] | None,
    is_causal: bool,
    scale: float,
) -> Float[Tensor, "*batch L S"]:
    """softmax(scores * scale + mask) in float32, with scaled_dot_product_attention's meaning of each argument.

    Args:
      scores: q k^T.
      mask: boolean (True takes part) or floating (added), broadcastable to the scores.
      is_causal: query i sees keys 0..i only.
      scale: multiplies the scores.
    """
    scores = scores.to(torch.float32) * scale
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, dim=-1)


def attention_scale(query: Tensor, scale: float | None) -> float:
    """The factor of the scores: `scale`, or 1 / sqrt(head size)."""
    return float(query.shape[-1]) ** -0.5 if scale is None else scale


def probability_step(probabilities: QuantSpec) -> Float[Tensor, ""]:
    """1 / qmax: the largest code is a probability of 1."""
    return torch.tensor(1.0 / probabilities.qmax, dtype=torch.float32)


def attend(
    query: Float[Tensor, "*batch L E"],
    key: Float[Tensor, "*batch S E"],
    value: Float[Tensor, "*batch S D"],
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    probabilities: QuantSpec,
) -> Float[Tensor, "*batch L D"]:
    """Attention with probabilities on the grid `probabilities` (zero point 0, step 1 / qmax), in `value`'s dtype."""
    weights = attention_probabilities(query @ key.transpose(-1, -2), mask, is_causal, attention_scale(query, scale))
    step = probability_step(probabilities).to(weights.device)
    return fake_quantize(weights, step, 0, probabilities).to(value.dtype) @ value
