"""What pipelines read from a network beside its config: the shape of its parts, without any weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.utils.outputs import BaseOutput
from torch import nn


def build_skeleton(class_name: str, config: Mapping[str, Any]) -> nn.Module | None:
    """The diffusers model of this class and config on the meta device; None if diffusers has no such class.

    Nothing else is looked up by name, and nothing is computed: the name may come from a file.
    """
    found = _model_class(class_name)
    if found is None or not config:
        return None
    with torch.device("meta"):
        built: nn.Module = found.from_config(dict(config))  # type: ignore[no-untyped-call]
    return built.requires_grad_(False).eval()


def output_class(class_name: str) -> type[BaseOutput] | None:
    """What the diffusers model of this class returns with return_dict=True; None if that is not known."""
    found = _model_class(class_name)
    annotation = get_type_hints(found.forward).get("return") if found is not None else None
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseOutput):
            return candidate
    return None


def _model_class(class_name: str) -> type[ModelMixin] | None:
    found = getattr(diffusers, class_name, None) if class_name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, ModelMixin) else None


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
