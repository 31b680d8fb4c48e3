"""Classifier-free guidance and the sampler around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from torch import Tensor

from qdiff_fx.assets import ConditionalPipeline, guided_prediction, load_conditional
from qdiff_fx.errors import InputError


class ContextSum(torch.nn.Module):
    """Predicts sample + sum of the context, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        self.batches.append(len(sample))
        return (sample + encoder_hidden_states.sum((1, 2))[:, None, None, None],)


@pytest.fixture(scope="module")
def pipeline() -> ConditionalPipeline:
    return load_conditional()


def noise(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def test_guidance_extrapolates_from_the_empty_branch_in_one_batch() -> None:
    unet = ContextSum()
    sample, context, empty = torch.zeros(2, 1, 1, 1), torch.full((2, 1, 1), 5.0), torch.full((2, 1, 1), 2.0)
    guided = guided_prediction(unet, sample, torch.tensor(1), context, empty, guidance_scale=3.0)
    assert guided.flatten().tolist() == [11.0, 11.0]  # 2 + 3 * (5 - 2)
    assert unet.batches == [4]


def test_guidance_scale_of_one_is_the_conditional_prediction(pipeline: ConditionalPipeline) -> None:
    context, empty = pipeline.class_context([0, 7]), pipeline.class_context([10, 10])
    with torch.no_grad():
        guided = guided_prediction(pipeline.unet, noise(2), torch.tensor(500), context, empty, 1.0)
        plain = pipeline.unet(noise(2), 500, encoder_hidden_states=context, return_dict=False)[0]
    # empty + (conditional - empty) rounds twice, and a batch of 4 may sum in another order than one of 2.
    torch.testing.assert_close(guided, plain, rtol=0, atol=1e-5)


def test_images_are_in_range_and_repeat_with_the_seed(pipeline: ConditionalPipeline) -> None:
    def draw(seed: int) -> Tensor:
        return pipeline([1, 8], num_inference_steps=3, generator=torch.Generator().manual_seed(seed))

    images = draw(0)
    assert images.shape == (2, 1, 28, 28)
    assert images.abs().max() <= 1
    assert torch.equal(images, draw(0))
    assert not torch.equal(images, draw(1))


def test_given_latents_are_the_starting_noise(pipeline: ConditionalPipeline) -> None:
    drawn = pipeline([3], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipeline([3], num_inference_steps=2, latents=noise(1)), drawn)


def test_a_call_leaves_scheduler_and_latents_alone(pipeline: ConditionalPipeline) -> None:
    before, latents = pipeline.scheduler.timesteps.clone(), noise(1)
    pipeline([3], num_inference_steps=2, latents=latents)
    assert torch.equal(pipeline.scheduler.timesteps, before)
    assert torch.equal(latents, noise(1))


def test_another_network_serves_one_call(pipeline: ConditionalPipeline) -> None:
    own, unet = pipeline.unet, ContextSum()
    pipeline([3, 4], num_inference_steps=2, latents=noise(2), unet=unet)
    assert unet.batches == [4, 4]
    assert pipeline.unet is own


def test_empty_prompt_without_guidance_matches_a_diffusers_pipeline(pipeline: ConditionalPipeline) -> None:
    class WithEmptyPrompt(torch.nn.Module):
        config, dtype, device = pipeline.unet.config, torch.float32, torch.device("cpu")

        def forward(self, sample: Tensor, timestep: Tensor) -> Any:
            return pipeline.unet(sample, timestep, encoder_hidden_states=pipeline.class_context([10]))

    reference = DDIMPipeline(WithEmptyPrompt(), pipeline.scheduler)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        batch_size=1, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    images = pipeline([10], num_inference_steps=3, guidance_scale=0.0, latents=noise(1))
    # Batches of 1 and 2 may sum in another order; three steps of a network of 60 layers amplify that.
    torch.testing.assert_close(images[0, 0] / 2 + 0.5, torch.from_numpy(expected[0, :, :, 0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("labels", [[], [11], [-1], [[1, 2]], [0.5]])
def test_labels_that_name_no_class_are_refused(pipeline: ConditionalPipeline, labels: Any) -> None:
    with pytest.raises(InputError, match="labels"):
        pipeline(labels)


def test_latents_of_another_shape_are_refused(pipeline: ConditionalPipeline) -> None:
    with pytest.raises(InputError, match="want \\[2, 1, 28, 28\\]"):
        pipeline([1, 2], latents=noise(1))
