"""What a change of type does to a network of integers: nothing, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from qdiff_fx.errors import QDiffWarning


def keeping_types(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, which a module applies to each of its tensors, without its casts: scales stay float32, unrounded.

    Integers that stay on their device stay where they are, which may be in a mapped file, in the layout that they have.
    """

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if result.device == tensor.device and not tensor.is_floating_point():
            return tensor
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved


def warn_of_cast(stage: str, carrier: torch.dtype, asked: torch.dtype, remedy: str) -> None:
    """Warn that a network stays in `carrier` although `asked` was asked for.

    Args:
      stage: "prepared" or "quantized".
      remedy: what gives a network in another carrier type, with {} in the place of the type.
    """
    warnings.warn(
        f"the {stage} network stays in its carrier type {carrier}: a cast to {asked} would round its scales. It takes "
        f"samples of every floating type and returns theirs, so that the other parts of a pipeline may be {asked}; for "
        f"a network in {asked}, {remedy.replace('{}', str(asked))}",
        QDiffWarning,
        stacklevel=6,  # past our own _apply, torch's to() and diffusers'
    )
