"""Sample both bundled models in full precision and print, as JSON, what the classifier makes of the images.

    python examples/check_samples.py --pictures OUT_DIR
    python examples/check_samples.py --originals FOLDER     # also: the bundled fp16 weights against fp32 ones

FOLDER holds uncond/ and cond/ as `train_fashion.py` writes them; the comparison runs both sets of weights on the
noisy samples of the fp32 model's own trajectory. The docs/model-card.md figures are this script's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from PIL import Image
from torch import Tensor

from qdiff_fx.assets import load_conditional, load_unconditional
from qdiff_fx.evaluation import (
    Trajectory,
    asked_class_share,
    confident_share,
    endpoint_psnr,
    output_sqnr,
    sample_ddim,
    sample_ddim_guided,
)


@dataclass(frozen=True, kw_only=True)
class NoisyBatch:
    """One call of a network on the noisy samples of a trajectory."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    timestep: float


def draw_noise(count: int, seed: int) -> Tensor:
    """Standard normal [count, 1, 28, 28]."""
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    """Write images [B, 1, 28, 28] in [-1, 1] as one picture, row by row, each pixel three pixels wide."""
    rows = len(images) // columns
    pixels = ((images[: rows * columns].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    grid = pixels.reshape(rows, columns, 28, 28).permute(0, 2, 1, 3).reshape(rows * 28, columns * 28)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid.numpy()).resize((columns * 84, rows * 84), Image.Resampling.NEAREST).save(path)


def load_original(network_class: Any, folder: Path) -> Any:
    """The fp32 network that `train_fashion.py` wrote to `folder`, in eval mode."""
    return network_class.from_pretrained(folder / "unet", local_files_only=True, low_cpu_mem_usage=False).eval()


def storage_error(
    original: Any,
    stored: Any,
    noise: Tensor,
    original_run: Trajectory,
    stored_run: Trajectory,
    timesteps: Tensor,
    **kwargs: Any,
) -> dict[str, float]:
    """How far the network with stored weights is from the original one, on the original's own trajectory."""
    inputs = (noise, *original_run.steps[:-1])
    batches = [
        NoisyBatch(args=(sample, timestep), kwargs=kwargs, timestep=float(timestep))
        for sample, timestep in zip(inputs, timesteps, strict=True)
    ]
    with torch.no_grad():
        differences = [
            (original(*batch.args, **kwargs).sample - stored(*batch.args, **kwargs).sample).abs().max()
            for batch in batches
        ]
    sqnr = output_sqnr(original, stored, batches)
    return {
        "largest_output_difference": float(torch.stack(differences).max()),
        "output_sqnr_pooled_db": sqnr.pooled_db,
        "output_sqnr_median_db": sqnr.median_db,
        "endpoint_psnr_median_db": endpoint_psnr(original_run.images, stored_run.images).median_db,
        "largest_image_difference": float((original_run.images - stored_run.images).abs().max()),
    }


def check_unconditional(arguments: argparse.Namespace) -> dict[str, Any]:
    """Share of confident classifications of the unconditional model's samples."""
    pipeline: Any = load_unconditional()
    noise = draw_noise(arguments.unconditional, arguments.seed)
    run = sample_ddim(pipeline.unet, pipeline.scheduler, noise, num_inference_steps=arguments.steps)
    figures: dict[str, Any] = {"samples": len(noise), "above_0.9_confidence": confident_share(run.images)}
    if arguments.pictures:
        save_grid(run.images, 16, arguments.pictures / "unconditional.png")
    if arguments.originals:
        original = load_original(UNet2DModel, arguments.originals / "uncond")
        few = noise[:16]
        pipeline.scheduler.set_timesteps(arguments.steps)
        original_run, stored_run = (
            sample_ddim(unet, pipeline.scheduler, few, num_inference_steps=arguments.steps, keep_steps=True)
            for unet in (original, pipeline.unet)
        )
        figures["fp16_storage"] = storage_error(
            original, pipeline.unet, few, original_run, stored_run, pipeline.scheduler.timesteps
        )
    return figures


def check_conditional(arguments: argparse.Namespace) -> dict[str, Any]:
    """Shares of confident classifications and of the asked class among the guided samples."""
    pipeline = load_conditional()
    noise = draw_noise(arguments.conditional, arguments.seed)
    labels = torch.arange(len(noise)) % 10
    guidance: dict[str, Any] = {
        "guidance_scale": arguments.guidance_scale,
        "num_inference_steps": arguments.steps,
        "empty_context": pipeline.context[10:],
    }
    context = pipeline.class_context(labels)
    images = sample_ddim_guided(pipeline.unet, pipeline.scheduler, noise, context=context, **guidance).images
    figures: dict[str, Any] = {
        "samples": len(noise),
        "guidance_scale": arguments.guidance_scale,
        "above_0.9_confidence": confident_share(images),
        "asked_class": asked_class_share(images, labels),
        "asked_class_by_label": [asked_class_share(images[label::10], labels[label::10]) for label in range(10)],
    }
    if arguments.pictures:
        save_grid(images, 10, arguments.pictures / "conditional.png")
    if arguments.originals:
        original = load_original(UNet2DConditionModel, arguments.originals / "cond")
        few, context = noise[:10], context[:10]
        pipeline.scheduler.set_timesteps(arguments.steps)
        original_run, stored_run = (
            sample_ddim_guided(unet, pipeline.scheduler, few, context=context, keep_steps=True, **guidance)
            for unet in (original, pipeline.unet)
        )
        figures["fp16_storage"] = storage_error(
            original,
            pipeline.unet,
            few,
            original_run,
            stored_run,
            pipeline.scheduler.timesteps,
            encoder_hidden_states=context,
        )
    return figures


def main() -> None:
    """Print the figures of both models."""
    parser = argparse.ArgumentParser(description="Check the bundled full-precision models by their samples.")
    parser.add_argument("--unconditional", type=int, default=256, help="number of unconditional samples")
    parser.add_argument("--conditional", type=int, default=100, help="number of conditional samples, classes in turn")
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=Path, help="folder for pictures of the samples")
    parser.add_argument("--originals", type=Path, help="folder with the fp32 models uncond/ and cond/")
    arguments = parser.parse_args()
    figures = {"unconditional": check_unconditional(arguments), "conditional": check_conditional(arguments)}
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
