"""Example calls of diffusers UNets, from their configs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qdiff_fx.errors import InputError

_BATCH = 2
_CONTEXT_TOKENS = 7
_LARGEST_SIDE = 64


def example_call(unet: nn.Module) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """(args, kwargs) of a call of a diffusers UNet, as its config describes it. Values are arbitrary.

    Raises: InputError for a module without such a config.
    """
    config = getattr(unet, "config", None)
    pictures = (config or {}).get("conditioning_embedding_out_channels")  # of a ControlNet
    if config is None or "in_channels" not in config or ("sample_size" not in config and pictures is None):
        raise InputError(
            f"{type(unet).__name__} has no diffusers config to derive inputs from; "
            f"pass example_inputs=(sample, timestep, ...) with a batch of 2 or more"
        )
    multiple = 2 ** (len(config.get("block_out_channels") or [0]) - 1)
    sides = config.get("sample_size") or 32
    height, width = (sides, sides) if isinstance(sides, int) else sides
    height, width = (max(multiple, min(side, _LARGEST_SIDE) // multiple * multiple) for side in (height, width))
    sample = torch.zeros(_BATCH, config["in_channels"], height, width)
    args: tuple[Tensor, ...] = (sample, torch.zeros(_BATCH, dtype=torch.float32))
    kwargs: dict[str, Any] = {}
    context = config.get("cross_attention_dim")
    if context is not None:
        size = context if isinstance(context, int) else context[0]
        args = (*args, torch.zeros(_BATCH, _CONTEXT_TOKENS, config.get("encoder_hid_dim") or size))
    if config.get("num_class_embeds"):
        kwargs["class_labels"] = torch.zeros(_BATCH, dtype=torch.int64)
    elif config.get("class_embed_type") == "timestep":
        kwargs["class_labels"] = torch.zeros(_BATCH, dtype=torch.float32)
    elif config.get("class_embed_type") in ("projection", "simple_projection"):
        kwargs["class_labels"] = torch.zeros(_BATCH, config["projection_class_embeddings_input_dim"])
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        kwargs["added_cond_kwargs"] = {"text_embeds": torch.zeros(_BATCH, pooled), "time_ids": torch.zeros(_BATCH, 6)}
    if config.get("time_cond_proj_dim"):  # latent consistency models: the embedded guidance scale
        kwargs["timestep_cond"] = torch.zeros(_BATCH, config["time_cond_proj_dim"])
    if pictures is not None:
        scale = 2 ** (len(pictures) - 1)
        channels = config.get("conditioning_channels") or 3
        kwargs["controlnet_cond"] = torch.zeros(_BATCH, channels, height * scale, width * scale)
        kwargs |= {"conditioning_scale": 1.0, "guess_mode": False}  # what pipelines give; constants of the capture
    dtype, device = _carrier(unet)
    return tuple(_to(item, dtype, device) for item in args), _to(kwargs, dtype, device)


def _carrier(unet: nn.Module) -> tuple[torch.dtype, torch.device]:
    parameter = next((item for item in unet.parameters() if item.is_floating_point()), torch.empty(0))
    return parameter.dtype, parameter.device


def _to(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _to(item, dtype, device) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    # The timestep stays float32: [B], the one 1-d floating input.
    if value.is_floating_point() and value.dim() > 1:
        return value.to(device, dtype)
    return value.to(device)
