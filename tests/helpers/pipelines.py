"""Text-to-image pipelines of tiny random parts, built from configs: whole, with real schedulers and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn

from adapters import PICTURE

CONTEXT = 8
_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 2,
}


def stable_diffusion(folder: Path, **changes: Any) -> StableDiffusionPipeline:
    """Stable Diffusion with a UNet of one level; `folder` gets the tokenizer's files."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**_UNET | {"cross_attention_dim": CONTEXT} | changes).eval()
    return _quiet(StableDiffusionPipeline(unet=unet, **stable_parts(folder)))


def stable_diffusion_xl(folder: Path) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: two text encoders, pooled embeddings and sizes."""
    torch.manual_seed(0)
    added = {
        "cross_attention_dim": 2 * CONTEXT,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + CONTEXT,
    }
    parts = stable_parts(folder)
    pipe = StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(**_UNET | added).eval(),
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")},
        text_encoder_2=text_encoder(projected=True),
        tokenizer_2=parts["tokenizer"],
        add_watermarker=False,
    )
    return _quiet(pipe)


def stable_parts(folder: Path) -> dict[str, Any]:
    """What every Stable Diffusion pipeline has beside its UNet."""
    return {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(folder / "tokenizer"),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=64,
    ).eval()


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer whose vocabulary is letters, made here."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def text_encoder(*, projected: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=60,
        hidden_size=8,
        intermediate_size=8,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=52,
        eos_token_id=53,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    encoder: nn.Module = kind(config).eval()
    return encoder


def picture_encoder() -> dict[str, Any]:
    """What embeds the picture that an IP-Adapter is handed."""
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        projection_dim=PICTURE,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return {
        "image_encoder": transformers.CLIPVisionModelWithProjection(config).eval(),
        "feature_extractor": transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8),
    }
