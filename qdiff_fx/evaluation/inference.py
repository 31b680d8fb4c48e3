"""Calling networks for measurement: in eval mode, without gradients, whatever form their output has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qdiff_fx.errors import InputError


@contextmanager
def evaluating(*networks: Callable[..., Any]) -> Iterator[None]:
    """Every submodule of `networks` is in eval mode and no gradients are kept inside; then all is as it was.

    Callables that are no modules are left alone.
    """
    training = [
        module
        for network in networks
        if isinstance(network, nn.Module)
        for module in network.modules()
        if module.training
    ]
    # The flag itself, not .train(): exported graph modules refuse that call, and a parent's would set its children too.
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def output_tensor(output: Any) -> Tensor:
    """The tensor of a network's output: the output itself, its `.sample` (diffusers), or a tuple's first entry.

    Raises: InputError if there is none.
    """
    candidate = getattr(output, "sample", None)
    if not isinstance(candidate, Tensor):
        candidate = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(candidate, Tensor):
        raise InputError(f"the network returned {type(output).__name__}: want a tensor, a tuple of them or .sample")
    return candidate
