"""Train the small diffusion models that the package bundles.

    python examples/train_fashion.py uncond OUT_DIR    # UNet2DModel, pixel-space DDPM (the CIFAR-10 DDPM's family)
    python examples/train_fashion.py cond OUT_DIR      # UNet2DConditionModel, cross-attention and guidance

Data: Fashion-MNIST (Zalando Research, MIT), Debian package `dataset-fashion-mnist`. Velocity prediction, linear betas
1e-4..0.02, 1,000 steps: with epsilon prediction, after the same 2,400 steps, the error at t > 800 (0.0036 against a
floor of about 2e-5) still left the samples noise; velocity needs no near-identity there.

Writes diffusers folders unet/ (averaged weights, fp32 safetensors) and scheduler/ (DDIM), model_index.json for
DDIMPipeline (uncond), context.safetensors (cond) and train_log.json. Interrupt it at any time: the last checkpoint
stays and a new run resumes from it. The bundled models were made in two runs each, see docs/model-card.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from qdiff_fx.evaluation.fashion_mnist import DEBIAN_FOLDER, read_fashion_mnist

LOGGER = logging.getLogger(__name__)

CONTEXT_TOKENS, CONTEXT_DIM, EMPTY_PROMPT = 4, 64, 10
EMPTY_PROMPT_SHARE = 0.1
WARM_UP_STEPS = 200
NOISE_SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "v_prediction"}


def class_context() -> Tensor:
    """[11, 4, 64] fixed stand-ins for text embeddings: a row of tokens a class, the last one the empty prompt."""
    return torch.randn(11, CONTEXT_TOKENS, CONTEXT_DIM, generator=torch.Generator().manual_seed(2023))


def build(kind: str) -> Any:
    """The untrained network of the "uncond" or the "cond" model."""
    shared = {"sample_size": 28, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64, 128)}
    if kind == "uncond":
        # The original DDPM network, narrower: one attention head, asymmetric padding before downsampling.
        network: Any = UNet2DModel
        return network(
            **shared,
            layers_per_block=2,
            attention_head_dim=None,
            norm_eps=1e-6,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )
    network = UNet2DConditionModel
    return network(
        **shared,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=CONTEXT_DIM,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def sampler_config() -> Any:
    """The DDIM scheduler that is stored with the model."""
    # Clipping the predicted image while DDIM keeps the unclipped noise leaves grain, with guidance above all.
    scheduler: Any = DDIMScheduler
    return scheduler(**NOISE_SCHEDULE, clip_sample=False)


def write_model(kind: str, averaged: dict[str, Tensor], context: Tensor, out: Path) -> None:
    """Write the averaged weights as a diffusers folder."""
    network = build(kind)
    network.load_state_dict(averaged)
    if kind == "uncond":
        pipeline: Any = DDIMPipeline
        pipeline(network, sampler_config()).save_pretrained(out)
        return
    network.save_pretrained(out / "unet")
    sampler_config().save_pretrained(out / "scheduler")
    save_file({"context": context}, out / "context.safetensors")


def training_batch(kind: str, images: Tensor, labels: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Images [B, 1, 28, 28], mirrored at random for the unconditional model, and their labels [B]."""
    indices = torch.randint(0, len(images), (batch_size,))
    batch = images[indices]
    if kind == "uncond":
        mirrored = torch.rand(batch_size) < 0.5
        batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
    return batch, labels[indices]


def velocity_loss(model: Any, scheduler: Any, kind: str, images: Tensor, labels: Tensor, context: Tensor) -> Tensor:
    """Mean squared error of the velocity at random timesteps; a tenth of the conditions is the empty prompt."""
    noise, timesteps = torch.randn_like(images), torch.randint(0, 1000, (len(images),))
    noisy = scheduler.add_noise(images, noise, timesteps).to(memory_format=torch.channels_last)
    condition: tuple[Tensor, ...] = ()
    if kind == "cond":
        dropped = torch.rand(len(images)) < EMPTY_PROMPT_SHARE
        condition = (context[torch.where(dropped, EMPTY_PROMPT, labels)],)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = model(noisy, timesteps, *condition, return_dict=False)[0]
    return torch.nn.functional.mse_loss(velocity.float(), scheduler.get_velocity(images, noise, timesteps))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps times a half cosine over all of them."""
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(arguments: argparse.Namespace) -> None:
    """Train until `arguments.steps`, writing the model and a resume file every `arguments.every` steps."""
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    images, labels = read_fashion_mnist(arguments.data, "train")
    context = class_context()
    unet = build(arguments.kind)
    if arguments.init:
        unet.load_state_dict(load_file(arguments.init / "unet/diffusion_pytorch_model.safetensors"))
    unet.to(memory_format=torch.channels_last)
    averaged = {name: tensor.detach().clone() for name, tensor in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=arguments.lr, weight_decay=0.0)
    noise_scheduler: Any = DDPMScheduler
    scheduler = noise_scheduler(**NOISE_SCHEDULE)
    start, resume_file, log = 0, arguments.out / "resume.pt", []
    if resume_file.exists():
        state = torch.load(resume_file, weights_only=True)
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, start, log = state["averaged"], state["step"], state["log"]
    model: Any = torch.compile(unet)
    began, running_loss = time.time(), 0.0
    for step in range(start, arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr)
        batch, batch_labels = training_batch(arguments.kind, images, labels, arguments.batch)
        loss: Any = velocity_loss(model, scheduler, arguments.kind, batch, batch_labels, context)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in unet.state_dict().items():
                averaged[name].lerp_(tensor, 1 - decay)
        running_loss = loss.item() if step == start else 0.98 * running_loss + 0.02 * loss.item()
        if (step + 1) % arguments.every == 0 or step + 1 == arguments.steps:
            log.append({"step": step + 1, "loss": round(running_loss, 5), "seconds": round(time.time() - began, 1)})
            LOGGER.info("%s", log[-1])
            state = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged}
            torch.save({**state, "step": step + 1, "log": log}, resume_file)
            write_model(arguments.kind, averaged, context, arguments.out)
            (arguments.out / "train_log.json").write_text(json.dumps(log, indent=1))


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train a small diffusion model on Fashion-MNIST.")
    parser.add_argument("kind", choices=("uncond", "cond"))
    parser.add_argument("out", type=Path, help="folder to write to, and to resume from")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the four *-ubyte.gz files")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=8e-4, help="peak learning rate")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="folder written by an earlier run: start from its weights")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
