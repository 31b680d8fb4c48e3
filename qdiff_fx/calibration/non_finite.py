"""Where NaN or infinity first comes up in a module that is called as the sampler calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qdiff_fx.graph.finite import is_finite


def first_non_finite(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Path of the first innermost submodule whose output is not finite though its tensor inputs are; None if none is.

    Runs the call once more, with hooks that are gone afterwards, whatever happens.
    """
    found: list[str] = []

    def watch(path: str) -> Any:
        def hook(child: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not found and is_finite((args, kwargs)) and not is_finite(output):
                found.append(path)

        return hook

    # A child's hook runs before its parent's: the first to report is the innermost.
    handles = [
        child.register_forward_hook(watch(path or type(module).__name__), with_kwargs=True)
        for path, child in module.named_modules()
    ]
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
