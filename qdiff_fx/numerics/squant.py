"""SQuant: rounding without data. Flips of round-to-nearest that make rounding errors cancel over a kernel.

Guo et al. 2022, "SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian Approximation", algorithm 1.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def squant_rounding(fraction: Float[Tensor, "O I *k"], free: Bool[Tensor, "O I *k"]) -> Bool[Tensor, "O I *k"]:
    """Whether each weight rounds up, so that errors sum to half a step at most over each kernel, then each channel.

    Starts at round-to-nearest (SQuant-E), flips the weights with the largest errors of a kernel (SQuant-K), then one
    weight in each of some kernels of an output channel (SQuant-C). A linear layer's kernels hold one weight each.

    Args:
      fraction: where a weight lies between its neighbours on the grid, in [0, 1).
      free: False where the grid ends, so that there is nothing to choose.
    """
    rows, columns = fraction.shape[:2]
    position = fraction.reshape(rows, columns, -1)
    choosable = free.reshape(rows, columns, -1)
    up = position >= 0.5
    up = _flip(up, _errors(up, position, choosable), choosable)
    # A channel's flips go to the kernels that err most in its direction, one each, there to the largest error.
    error = _errors(up, position, choosable)
    by_kernel = error.sum(2)
    direction = by_kernel.sum(1, keepdim=True).sign()
    agreeing = by_kernel * direction > 0
    gain = torch.where(choosable & (error * direction[..., None] > 0), error.abs(), -1.0)
    flipped_kernels = _flip(torch.zeros_like(agreeing), by_kernel, agreeing)
    place = torch.zeros_like(up).scatter_(2, gain.argmax(2, keepdim=True), flipped_kernels[..., None])
    return (up ^ place).reshape(fraction.shape)


def _errors(up: Tensor, position: Tensor, choosable: Tensor) -> Tensor:
    """Rounded minus exact, in steps; 0 where there is no choice."""
    return (up.to(position.dtype) - position) * choosable


def _flip(chosen: Tensor, error: Tensor, choosable: Tensor) -> Tensor:
    """`chosen` with the largest errors along the last axis flipped, as many as bring their sum within half a step."""
    total = error.sum(-1, keepdim=True)
    gain = torch.where(choosable & (error * total > 0), error.abs(), -1.0)
    rank = gain.argsort(dim=-1, descending=True).argsort(dim=-1)
    return chosen ^ ((rank < torch.round(total.abs())) & (gain > 0))
