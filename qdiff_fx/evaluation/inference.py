"""Calling networks for measurement: in eval mode, without gradients, whatever form their output has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.outputs import BaseOutput
from torch import Tensor, nn

from qdiff_fx.errors import InputError
from qdiff_fx.graph.signature import tree_leaves


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

    Of a network with several results, such as a ControlNet, all of them side by side: [B, values].

    Raises: InputError if there is none.
    """
    candidate = getattr(output, "sample", None)
    if not isinstance(candidate, Tensor):
        entries = output.to_tuple() if isinstance(output, BaseOutput) else output
        candidate = entries[0] if isinstance(entries, tuple | list) and entries else entries
        if isinstance(candidate, tuple | list):
            leaves = tree_leaves(entries)
            if leaves and all(isinstance(leaf, Tensor) and leaf.dim() > 1 for leaf in leaves):
                return torch.cat([leaf.flatten(1) for leaf in leaves], dim=1)
    if not isinstance(candidate, Tensor):
        raise InputError(f"the network returned {type(output).__name__}: want a tensor, a tuple of them or .sample")
    return candidate
