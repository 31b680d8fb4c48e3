"""The sampling loop and classifier-free guidance, without a pipeline around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qdiff_fx.calibration.collect import fresh_scheduler

Predict = Callable[[Tensor, Tensor], Tensor]
"""What a scheduler wants to know, [B, C, H, W], from (sample [B, C, H, W], timestep [])."""


@torch.no_grad()
def denoise(predict: Predict, scheduler: Any, noise: Tensor, num_inference_steps: int) -> Iterator[Tensor]:
    """The sample [B, C, H, W] after each of `num_inference_steps` steps; the last one is the image.

    Args:
      predict: the network, guidance included.
      scheduler: a diffusers scheduler that draws no noise of its own (DDIM with eta = 0, DPM-Solver++, Euler, ...);
        left as it is: the loop works on a fresh one of the same config.
      noise: [B, C, H, W], standard normal.
      num_inference_steps: of the scheduler's timesteps; multi-step schedulers may call the network more often.

    Raises: InputError if the scheduler refuses the number of steps.
    """
    scheduler = fresh_scheduler(scheduler, num_inference_steps, noise.device)
    sample: Tensor = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = predict(scheduler.scale_model_input(sample, timestep), timestep)
        sample = scheduler.step(prediction, timestep, sample, return_dict=False)[0]
        yield sample


def guided_prediction(
    unet: Callable[..., Any],
    sample: Tensor,
    timestep: Tensor,
    context: Tensor,
    empty_context: Tensor,
    guidance_scale: float,
) -> Tensor:
    """The classifier-free guided prediction, [B, C, H, W]; both branches run in one batch, the empty one first.

    empty + guidance_scale * (conditional - empty): Ho and Salimans (2022), equation 6, in the parametrisation
    of Stable Diffusion, where guidance_scale = 1 is the plain conditional model.

    Args:
      unet: called as `unet(sample, timestep, encoder_hidden_states=..., return_dict=False)[0]`.
      sample: [B, C, H, W], the noisy images.
      timestep: [].
      context, empty_context: [B, T, D].
      guidance_scale: 0 leaves the empty prompt alone, 1 the condition alone, more exaggerates the condition.
    """
    prediction: Tensor = unet(
        torch.cat([sample, sample]),
        timestep,
        encoder_hidden_states=torch.cat([empty_context, context]),
        return_dict=False,
    )[0]
    empty, conditional = prediction.chunk(2)
    return empty + guidance_scale * (conditional - empty)
