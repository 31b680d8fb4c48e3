"""Sampling trajectories from given noise: the same noise through two networks shows what quantization changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qdiff_fx.assets import denoise, guided_prediction
from qdiff_fx.errors import InputError
from qdiff_fx.evaluation.inference import evaluating, output_tensor


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What sampling went through.

    Args:
      images: [B, C, H, W], the result; not clamped to [-1, 1].
      steps: the sample [B, C, H, W] after each step, the last one equal to `images`; empty unless it was asked for.
    """

    images: Tensor
    steps: tuple[Tensor, ...] = ()


def sample_ddim(
    unet: Callable[..., Any],
    scheduler: Any,
    noise: Tensor,
    *,
    num_inference_steps: int = 50,
    keep_steps: bool = False,
) -> Trajectory:
    """The trajectory of an unconditional network from `noise`; the same arguments give the same images.

    Args:
      unet: called as `unet(sample, timestep, return_dict=False)[0]`; run in eval mode.
      scheduler: a diffusers DDIMScheduler, or another that draws no noise; left as it is.
      noise: [B, C, H, W], standard normal.
      num_inference_steps: at least 1.
      keep_steps: also return the sample after each step.
    """

    def predict(sample: Tensor, timestep: Tensor) -> Tensor:
        return output_tensor(unet(sample, timestep, return_dict=False))

    return _run(predict, unet, scheduler, noise, num_inference_steps, keep_steps)


def sample_ddim_guided(
    unet: Callable[..., Any],
    scheduler: Any,
    noise: Tensor,
    *,
    context: Tensor,
    empty_context: Tensor,
    guidance_scale: float = 3.0,
    num_inference_steps: int = 50,
    keep_steps: bool = False,
) -> Trajectory:
    """The trajectory of a conditional network from `noise` with classifier-free guidance.

    Args:
      unet: called as `unet(sample, timestep, encoder_hidden_states=..., return_dict=False)[0]` on both branches in
        one batch of 2B; run in eval mode.
      scheduler, noise, num_inference_steps, keep_steps: as in `sample_ddim`.
      context: [B, T, D].
      empty_context: [B, T, D] or [1, T, D], of the empty prompt.
      guidance_scale: see `qdiff_fx.assets.guided_prediction`.

    Raises: InputError if `context` has another batch size than `noise`.
    """
    if len(context) != len(noise):
        raise InputError(f"context for {len(context)} images, noise for {len(noise)}: want one row an image")
    empty = empty_context.expand_as(context)

    def predict(sample: Tensor, timestep: Tensor) -> Tensor:
        return guided_prediction(unet, sample, timestep, context, empty, guidance_scale)

    return _run(predict, unet, scheduler, noise, num_inference_steps, keep_steps)


def _run(
    predict: Callable[[Tensor, Tensor], Tensor],
    unet: Callable[..., Any],
    scheduler: Any,
    noise: Tensor,
    num_inference_steps: int,
    keep_steps: bool,
) -> Trajectory:
    if num_inference_steps < 1:
        raise InputError(f"num_inference_steps={num_inference_steps}: want at least 1")
    steps: list[Tensor] = []
    with evaluating(unet):
        for sample in denoise(predict, scheduler, noise, num_inference_steps):
            if keep_steps or not steps:
                steps.append(sample)
            else:
                steps[0] = sample
    return Trajectory(images=steps[-1], steps=tuple(steps) if keep_steps else ())
