"""What pipelines read from a network beside its config: the shape of its parts, without any weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import nn


def build_skeleton(class_name: str, config: Mapping[str, Any]) -> nn.Module | None:
    """The diffusers model of this class and config on the meta device; None if diffusers has no such class.

    Nothing else is looked up by name, and nothing is computed: the name may come from a file.
    """
    if not config or not class_name.isidentifier():
        return None
    found = getattr(diffusers, class_name, None)
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        return None
    with torch.device("meta"):
        built: nn.Module = found.from_config(dict(config))  # type: ignore[no-untyped-call]
    return built.requires_grad_(False).eval()


def readable(skeleton: nn.Module | None, name: str) -> Any:
    """A part of the skeleton or a plain value that it holds. Raises AttributeError for everything else.

    Methods are not served: what they change would be the skeleton, not the network.
    """
    if skeleton is None or name.startswith("_"):
        raise AttributeError(name)
    if name in skeleton._modules:
        return skeleton._modules[name]
    value = vars(skeleton).get(name, skeleton)
    if value is None or isinstance(value, (bool, int, float, str, tuple)):
        return value
    raise AttributeError(name)
