"""The public configs at their real size: class, config, millions of parameters, scaled dot products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel
from torch import nn

from adapters import picture, with_ip_adapter
from families import Call, residuals
from qdiff_fx.examples import example_call

_DDPM: dict[str, Any] = {
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "layers_per_block": 2,
}
_LATENT: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", *("AttnDownBlock2D",) * 3),
    "up_block_types": (*("AttnUpBlock2D",) * 3, "UpBlock2D"),
    "attention_head_dim": 32,
    "layers_per_block": 2,
}
_STABLE: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_STABLE_2: dict[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}

CONFIGS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], float, int]] = {
    "ddpm-cifar10": (
        UNet2DModel,
        _DDPM
        | {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
        35.7,
        6,
    ),
    "ddpm-church": (
        UNet2DModel,
        _DDPM
        | {
            "sample_size": 256,
            "block_out_channels": (128, 128, 256, 256, 512, 512),
            "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
        },
        113.7,
        6,
    ),
    "ldm-unconditional": (
        UNet2DModel,
        _LATENT | {"sample_size": 64, "block_out_channels": (224, 448, 672, 896)},
        274.1,
        16,
    ),
    "ldm-church": (
        UNet2DModel,
        {
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (192, 384, 384, 768, 768),
            "layers_per_block": 2,
            "down_block_types": (*("AttnDownBlock2D",) * 4, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("AttnUpBlock2D",) * 4),
            "attention_head_dim": 32,
            "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
        },
        288.5,
        21,
    ),
    "class-conditional-imagenet64": (
        UNet2DModel,
        {
            "sample_size": 64,
            "block_out_channels": (192, 384, 576, 768),
            "layers_per_block": 3,
            "down_block_types": ("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
            "up_block_types": (*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
            "attention_head_dim": 64,
            "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "num_class_embeds": 1000,
        },
        295.9,
        22,
    ),
    "controlnet-sd-1.5": (ControlNetModel, {"cross_attention_dim": 768, "attention_head_dim": 8}, 361.3, 14),
    "sd-1.5": (UNet2DConditionModel, _STABLE, 859.5, 32),
    "sd-1.5-inpainting": (UNet2DConditionModel, _STABLE | {"in_channels": 9}, 859.5, 32),
    "sd-1.5-with-controlnet-residuals": (UNet2DConditionModel, _STABLE, 859.5, 32),
    "sd-1.5-with-ip-adapter": (with_ip_adapter, _STABLE, 881.8, 48),
    "sd-2.1": (UNet2DConditionModel, _STABLE_2, 865.9, 32),
    "sdxl": (
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2567.5,
        140,
    ),
}

EXTRA: Mapping[str, Callable[[nn.Module, Call], dict[str, Any]]] = {
    "sd-1.5-with-controlnet-residuals": residuals,
    "sd-1.5-with-ip-adapter": picture,
}
"""Inputs that a family takes beside those of its config."""


def real_call(name: str, model: nn.Module) -> Call:
    """An example call of the family's model."""
    args, kwargs = example_call(model)
    extra = EXTRA[name](model, (args, kwargs)) if name in EXTRA else {}
    return args, kwargs | extra
