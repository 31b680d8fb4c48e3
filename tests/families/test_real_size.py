"""The public configs at their real size: what the passes find, on the meta device, so that it takes no memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

import qdiff_fx
from families import FAST, Family, attentions, fill, run_family, shortcuts
from subjects import signal_to_noise

pytestmark = pytest.mark.slow

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

CONFIGS: dict[str, tuple[type, dict[str, Any], float, int]] = {
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
    "sd-1.5": (UNet2DConditionModel, _STABLE, 859.5, 32),
    "sd-1.5-inpainting": (UNet2DConditionModel, _STABLE | {"in_channels": 9}, 859.5, 32),
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


def _expected_shortcuts(widths: tuple[int, ...], layers: int) -> Iterator[tuple[int, int]]:
    """Channels of [h, skip] at every block of the decoder, from the architecture's definition."""
    skips = [widths[0]]
    for level, width in enumerate(widths):
        skips += [width] * layers + [width] * (level < len(widths) - 1)
    hidden = widths[-1]
    for width in reversed(widths):
        for _ in range(layers + 1):
            yield hidden, skips.pop()
            hidden = width


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_found_at_real_size(name: str) -> None:
    kind, config, millions, count = CONFIGS[name]
    with torch.device("meta"):
        unet = kind(**config).eval()
    assert sum(item.numel() for item in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    prepared = qdiff_fx.prepare(unet, FAST)
    wanted = tuple(_expected_shortcuts(tuple(unet.config.block_out_channels), unet.config.layers_per_block))
    assert shortcuts(prepared.graph_module) == wanted
    assert attentions(prepared.graph_module) == count
    assert all(item.is_meta for item in prepared.parameters())


@pytest.mark.timeout(1200)
def test_the_cifar_model_goes_through_the_whole_chain(tmp_path: Path) -> None:
    kind, config, _, count = CONFIGS["ddpm-cifar10"]
    run = run_family(Family(build=lambda: kind(**config), shortcuts=(), attentions=count), tmp_path, release=True)
    loaded = qdiff_fx.load(tmp_path, backend="reference")
    args, kwargs = fill(run.calls[0], 420.0, 11)
    with torch.no_grad():
        wanted, seen = run.model(*args, **kwargs).sample, loaded(*args, **kwargs).sample
        assert torch.equal(seen, run.quantized(*args, **kwargs).sample)
    assert signal_to_noise(wanted, seen) > 8
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 0.14 * 4 * 35.7e6
