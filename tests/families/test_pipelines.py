"""Unmodified diffusers pipelines, built from tiny random parts, run with quantized UNets inside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    LDMPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    VQModel,
)
from PIL import Image

import qdiff_fx
from families import FamilyRun
from pipelines import picture_encoder, stable_parts, text_encoder

Chain = Callable[[str], FamilyRun]

PROMPT = "a boot"
STEPS: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return stable_parts(tmp_path_factory.mktemp("clip"))


def _loaded(chain: Chain, name: str) -> qdiff_fx.QuantizedUNet:
    return qdiff_fx.load(chain(name).folder, backend="reference")


def _images(pipe: Any, *args: Any, **call: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images: np.ndarray = pipe(*args, generator=generator, **STEPS | call).images
    assert np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1
    return images


def _close(pipe: Any, quantized: Any, *args: Any, **call: Any) -> np.ndarray:
    """The pipeline's pictures with the quantized UNet, which are near its own and not the same."""
    wanted = _images(pipe, *args, **call)
    pipe.unet = quantized
    seen = _images(pipe, *args, **call)
    assert seen.shape == wanted.shape
    assert 0 < np.abs(seen - wanted).mean() < 0.1
    return seen


@pytest.mark.parametrize("kind", [DDIMPipeline, DDPMPipeline])
def test_pixel_pipelines(kind: Any, chain: Chain) -> None:
    scheduler = DDIMScheduler() if kind is DDIMPipeline else DDPMScheduler()
    pipe = kind(unet=chain("ddpm").model, scheduler=scheduler)
    assert _close(pipe, _loaded(chain, "ddpm"), batch_size=2).shape == (2, 8, 8, 3)


def test_a_latent_pipeline_with_a_vq_model(chain: Chain) -> None:
    torch.manual_seed(0)
    vqvae = VQModel(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=3,
        num_vq_embeddings=16,
    ).eval()
    pipe = LDMPipeline(vqvae=vqvae, unet=chain("ddpm").model, scheduler=DDIMScheduler(clip_sample=False))
    assert _images(pipe).shape == (1, 16, 16, 3)
    pipe.unet = _loaded(chain, "ddpm")
    assert _images(pipe, batch_size=2).shape == (2, 16, 16, 3)  # nearest codes jump, so pictures are not compared


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_stable_diffusion(guidance_scale: float, chain: Chain, parts: dict[str, Any]) -> None:
    pipe = StableDiffusionPipeline(unet=chain("sd-1").model, **parts)
    images = _close(pipe, _loaded(chain, "sd-1"), PROMPT, guidance_scale=guidance_scale)
    assert images.shape == (1, 64, 64, 3)
    assert _images(pipe, [PROMPT] * 2, height=64, width=128, guidance_scale=guidance_scale).shape == (2, 64, 128, 3)


def test_few_steps_with_lcm(chain: Chain, parts: dict[str, Any]) -> None:
    pipe = StableDiffusionPipeline(unet=chain("sd-1").model, **{**parts, "scheduler": LCMScheduler(steps_offset=1)})
    _close(pipe, _loaded(chain, "sd-1"), PROMPT, guidance_scale=1.0)


def test_image_to_image(chain: Chain, parts: dict[str, Any]) -> None:
    pipe = StableDiffusionImg2ImgPipeline(unet=chain("sd-1").model, **parts)
    picture = Image.new("RGB", (64, 64), (200, 30, 90))
    _close(pipe, _loaded(chain, "sd-1"), PROMPT, image=picture, strength=0.9)


def test_inpainting_with_nine_channels(chain: Chain, parts: dict[str, Any]) -> None:
    pipe = StableDiffusionInpaintPipeline(unet=chain("inpainting").model, **parts)
    picture, mask = Image.new("RGB", (64, 64), (200, 30, 90)), Image.new("L", (64, 64), 255)
    quantized = _loaded(chain, "inpainting")
    _close(pipe, quantized, PROMPT, image=picture, mask_image=mask, height=64, width=64)


def test_stable_diffusion_xl(chain: Chain, parts: dict[str, Any]) -> None:
    """Its pipeline reads unet.add_embedding.linear_1.in_features."""
    unet: Any = chain("sdxl").model
    shared = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    pipe = StableDiffusionXLPipeline(
        unet=unet,
        **shared,
        text_encoder_2=text_encoder(projected=True),
        tokenizer_2=parts["tokenizer"],
        add_watermarker=False,
    )
    _close(pipe, _loaded(chain, "sdxl"), PROMPT, height=64, width=64)


def test_a_unet_takes_what_a_controlnet_hands_it(chain: Chain, parts: dict[str, Any]) -> None:
    """The ControlNet stays the original: this pipeline asks for an instance of its class."""
    pipe = StableDiffusionControlNetPipeline(
        unet=chain("controlled").model, controlnet=chain("controlnet").model, **parts
    )
    picture = Image.new("RGB", (64, 64), (200, 30, 90))
    _close(pipe, _loaded(chain, "controlled"), PROMPT, image=picture)


def test_an_ip_adapter_reads_a_picture(chain: Chain, parts: dict[str, Any]) -> None:
    pipe: Any = StableDiffusionPipeline(unet=chain("ip-adapter").model, **parts | picture_encoder())
    embeds = pipe.prepare_ip_adapter_image_embeds(Image.new("RGB", (64, 64), (200, 30, 90)), None, "cpu", 1, True)
    seen = _close(pipe, _loaded(chain, "ip-adapter"), PROMPT, ip_adapter_image_embeds=embeds, guidance_scale=5.0)
    other = _images(pipe, PROMPT, ip_adapter_image_embeds=[-embeds[0]], guidance_scale=5.0)
    assert np.abs(seen - other).max() > 1e-4


def test_a_pipeline_folder_with_our_unet_loads_by_itself(chain: Chain, parts: dict[str, Any], tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline(unet=_loaded(chain, "sd-1"), **parts)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["qdiff_fx.model", "QuantizedUNet"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True, requires_safety_checker=False)
    assert type(loaded) is StableDiffusionPipeline and isinstance(loaded.unet, qdiff_fx.QuantizedUNet)
    loaded.unet = qdiff_fx.QuantizedUNet.from_pretrained(tmp_path, subfolder="unet", backend="reference")
    assert (_images(loaded, PROMPT) == _images(pipe, PROMPT)).all()
