"""Trajectories from given noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from qdiff_fx.assets import load_conditional, load_unconditional
from qdiff_fx.errors import InputError
from qdiff_fx.evaluation.sampling import sample_ddim, sample_ddim_guided


class ExactDenoiser(nn.Module):
    """Knows that every image is `value`, and predicts the noise that was added to it; drops out in training mode."""

    def __init__(self, scheduler: DDIMScheduler, value: float) -> None:
        super().__init__()
        self.alphas, self.value, self.dropout = scheduler.alphas_cumprod, value, nn.Dropout(0.5)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        alpha = self.alphas[timestep]
        return (self.dropout((sample - alpha.sqrt() * self.value) / (1 - alpha).sqrt()),)


def noise(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def test_an_exact_denoiser_ends_at_the_image_although_left_in_training_mode() -> None:
    scheduler = DDIMScheduler(prediction_type="epsilon", clip_sample=False)
    unet = ExactDenoiser(scheduler, 0.25).train()
    run = sample_ddim(unet, scheduler, noise(2), num_inference_steps=10, keep_steps=True)
    # fp32 rounding of the noise is divided by sqrt(alpha), 0.006 at the first step: 1e-7 / 0.006 = 2e-5.
    torch.testing.assert_close(run.images, torch.full((2, 1, 28, 28), 0.25), rtol=0, atol=1e-4)
    assert unet.training
    assert len(run.steps) == 10
    assert torch.equal(run.steps[-1], run.images)


def test_images_are_those_of_the_pipeline_from_the_same_noise() -> None:
    pipeline: Any = load_unconditional()
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    images = sample_ddim(pipeline.unet, pipeline.scheduler, noise(2), num_inference_steps=4).images
    # The pipeline maps to [0, 1] in fp32: one rounding of values up to 1.
    torch.testing.assert_close(
        (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), torch.from_numpy(expected), rtol=0, atol=1e-6
    )


def test_guided_images_are_those_of_the_conditional_pipeline() -> None:
    pipeline = load_conditional()
    images = sample_ddim_guided(
        pipeline.unet,
        pipeline.scheduler,
        noise(2),
        context=pipeline.class_context([0, 7]),
        empty_context=pipeline.context[10:],
        num_inference_steps=3,
    ).images
    assert torch.equal(images.clamp(-1, 1), pipeline([0, 7], num_inference_steps=3, latents=noise(2)))


# diffusers 0.42 hands tensors to np.array in a way that NumPy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scheduler_class", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_without_noise_of_their_own_repeat_the_picture(scheduler_class: Any) -> None:
    pipeline: Any = load_unconditional()
    scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    first, second = (sample_ddim(pipeline.unet, scheduler, noise(1), num_inference_steps=4).images for _ in range(2))
    assert first.isfinite().all()
    # A scheduler that carried state from the first run into the second would change it.
    assert torch.equal(first, second)


def test_scheduler_and_noise_are_left_alone() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    timesteps, start = scheduler.timesteps.clone(), noise(1)
    run = sample_ddim(ExactDenoiser(scheduler, 0.0), scheduler, start, num_inference_steps=3)
    assert torch.equal(scheduler.timesteps, timesteps)
    assert torch.equal(start, noise(1))
    assert run.steps == ()


def test_zero_steps_and_another_batch_of_contexts_are_refused() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    with pytest.raises(InputError, match="want at least 1"):
        sample_ddim(ExactDenoiser(scheduler, 0.0), scheduler, noise(1), num_inference_steps=0)
    with pytest.raises(InputError, match="one row an image"):
        sample_ddim_guided(
            torch.sin, scheduler, noise(2), context=torch.zeros(3, 4, 64), empty_context=torch.zeros(1, 4, 64)
        )
