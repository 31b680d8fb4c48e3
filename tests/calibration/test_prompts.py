"""Prompts become what the pipeline itself hands to its network, in both guidance branches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from pipelines import CONTEXT, stable_diffusion, stable_diffusion_xl, stable_parts
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.errors import InputError

STEPS = 4
SIZES: dict[str, Any] = {"num_inference_steps": STEPS, "num_timesteps": STEPS}


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_rows_are_what_the_pipeline_gives_its_network_on_the_same_noise(
    make: Any, guidance_scale: float, tmp_path: Path
) -> None:
    pipe = make(tmp_path)
    branches = 2 if guidance_scale > 1 else 1
    data = CalibrationSet.collect(
        pipe, prompts=["a red"], guidance_scale=guidance_scale, samples_per_timestep=branches, **SIZES
    )
    rows = {batch.timestep: batch for batch in data.batches(branches)}
    noise = rows[max(data.timesteps)].args[0][:1]
    with CalibrationSet.record(pipe.unet, samples_per_timestep=branches, num_timesteps=STEPS) as recording:
        pipe("a red", latents=noise, guidance_scale=guidance_scale, num_inference_steps=STEPS, output_type="latent")
    assert recording.dataset.timesteps == data.timesteps
    for wanted in recording.dataset.batches(branches):
        seen = rows[wanted.timestep]
        # Branches of one call against branches apart: rounding, times the guidance at each step.
        torch.testing.assert_close(seen.args[0], wanted.args[0], rtol=0, atol=1e-4)
        shared = set(seen.kwargs)
        assert {name for name, value in wanted.kwargs.items() if value is not None} - shared == {"return_dict"}
        torch.testing.assert_close(seen.kwargs, {name: wanted.kwargs[name] for name in shared}, rtol=0, atol=0)


def test_every_prompt_is_drawn_and_the_pipeline_is_left_as_it_was(tmp_path: Path) -> None:
    pipe = stable_diffusion_xl(tmp_path)
    scheduler = pipe.scheduler
    prompts = [f"a {letter}" for letter in "bcdefghijk"]  # more than are encoded at a time
    data = CalibrationSet.collect(pipe, prompts=prompts, guidance_scale=5.0, samples_per_timestep=20, **SIZES)
    (first,) = [batch for batch in data.batches(20) if batch.timestep == max(data.timesteps)]
    embeddings = first.kwargs["added_cond_kwargs"]["text_embeds"]
    assert embeddings.shape == (20, CONTEXT)
    assert len({tuple(row.tolist()) for row in first.kwargs["encoder_hidden_states"].flatten(1)}) == 11  # and the empty
    assert pipe.scheduler is scheduler and scheduler.num_inference_steps is None
    assert pipe._progress_bar_config == {"disable": True}


def test_another_size_reaches_latents_and_size_conditions(tmp_path: Path) -> None:
    pipe = stable_diffusion_xl(tmp_path)
    data = CalibrationSet.collect(
        pipe, prompts=["a"], sample_shape=(4, 8, 16), guidance_scale=5.0, samples_per_timestep=2, **SIZES
    )
    batch = next(iter(data.batches(2)))
    assert batch.args[0].shape == (2, 4, 8, 16)
    assert batch.kwargs["added_cond_kwargs"]["time_ids"][0].tolist() == [64, 128, 0, 0, 64, 128]


def test_an_embedded_guidance_scale_is_a_condition_of_one_branch(tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path, time_cond_proj_dim=4)
    data = CalibrationSet.collect(pipe, prompts=["a"], guidance_scale=8.0, samples_per_timestep=2, **SIZES)
    batch = next(iter(data.batches(2)))
    assert batch.kwargs["timestep_cond"].shape == (2, 4)
    assert not torch.equal(batch.args[0][0], batch.args[0][1])  # two trajectories, not two branches of one


@pytest.mark.parametrize("prompts", [[], "a boot", [1]])
def test_prompts_are_a_list_of_texts(prompts: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="want a list of one or more strings"):
        CalibrationSet.collect(stable_diffusion(tmp_path), prompts=prompts, **SIZES)


def test_prompts_and_conditions_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exclude each other"):
        CalibrationSet.collect(
            stable_diffusion(tmp_path), prompts=["a"], encoder_hidden_states=torch.ones(1, 8, CONTEXT), **SIZES
        )


def test_a_pipeline_that_needs_a_picture_points_to_record(tmp_path: Path) -> None:
    pipe = StableDiffusionImg2ImgPipeline(unet=stable_diffusion(tmp_path / "a").unet, **stable_parts(tmp_path / "b"))
    with pytest.raises(InputError, match=r"cannot run on prompts alone .* use CalibrationSet.record") as caught:
        CalibrationSet.collect(pipe, prompts=["a"], **SIZES)
    assert "\n" not in str(caught.value)
