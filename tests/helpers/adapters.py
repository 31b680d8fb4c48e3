"""UNets with an IP-Adapter or a LoRA of random weights, put in as diffusers puts them in."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

PICTURE, PICTURE_TOKENS = 1024, 4
"""Sizes of a picture's embedding, and how many tokens an IP-Adapter in its plain form makes of it."""


def with_ip_adapter(**config: Any) -> UNet2DConditionModel:
    """A UNet with an IP-Adapter."""
    return add_ip_adapter(UNet2DConditionModel(**config))


def add_ip_adapter(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Give the UNet a second pair of key and value projections beside each cross-attention, and a projection."""
    context: int = unet.config.cross_attention_dim
    crossed = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    widths = [unet.get_submodule(name.removesuffix(".processor")).to_q.out_features for name in crossed]
    projection = {
        "proj.weight": torch.randn(PICTURE_TOKENS * context, PICTURE) * PICTURE**-0.5,
        "proj.bias": torch.zeros(PICTURE_TOKENS * context),
        "norm.weight": torch.ones(context),
        "norm.bias": torch.zeros(context),
    }
    pairs = {
        f"{2 * index + 1}.to_{kind}_ip.weight": torch.randn(width, context) * context**-0.5
        for index, width in enumerate(widths)
        for kind in "kv"
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": pairs}], low_cpu_mem_usage=False)
    return unet


def picture(_model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """What an IP-Adapter is handed beside the text: the embedding of one picture."""
    sample: Tensor = call[0][0]
    return {"added_cond_kwargs": {"image_embeds": [sample.new_zeros(len(sample), 1, PICTURE)]}}


def with_lora(**config: Any) -> UNet2DConditionModel:
    """A UNet with a LoRA beside some of its projections and convolutions, not fused."""
    unet = UNet2DConditionModel(**config)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
    return unet


def with_fused_lora(**config: Any) -> UNet2DConditionModel:
    """The same with the LoRA added to the weights; peft's layers stay around them."""
    unet = with_lora(**config)
    unet.fuse_lora()
    return unet
