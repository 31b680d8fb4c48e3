"""One yardstick, many arms."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from qdiff_fx.errors import InputError
from qdiff_fx.evaluation import Trajectory, endpoint_psnr, output_sqnr, sample_ddim, sample_ddim_guided, study
from qdiff_fx.evaluation.study import Yardstick


class Network(nn.Module):
    """A denoiser that counts its calls."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        self.calls += 1
        context = 0.0 if encoder_hidden_states is None else encoder_hidden_states.mean((1, 2))[:, None, None, None]
        return (0.5 * sample * (1 + self.error) + 0.1 * context,)


NOISE = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def sampler(unet: Any, *, keep_steps: bool = True) -> Trajectory:
    return sample_ddim(unet, DDIMScheduler(clip_sample=False), NOISE, num_inference_steps=7, keep_steps=keep_steps)


def test_the_reference_runs_its_trajectory_once_for_all_arms() -> None:
    reference = Network()
    yardstick = Yardstick(reference, sampler, num_timesteps=4)
    for error in (0.1, 0.2):
        yardstick.measure(Network(error))
    assert reference.calls == 7


def test_heldout_calls_are_evenly_spaced_with_first_and_last() -> None:
    calls = Yardstick(Network(), sampler, num_timesteps=3).calls
    assert [call.timestep for call in calls] == [852.0, 426.0, 0.0]
    assert torch.equal(calls[0].args[0], NOISE)


def test_seconds_of_a_step_are_counted_around_the_networks_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(study, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    yardstick = Yardstick(Network(), sampler, num_timesteps=3)
    assert next(ticks) == 14  # two looks at the clock a call
    assert yardstick.seconds_per_step == yardstick.measure(Network(0.1)).seconds_per_step == 1.0


def test_both_yardsticks_agree_with_their_direct_measurement() -> None:
    reference, network = Network(), Network(0.05)
    yardstick = Yardstick(reference, sampler, num_timesteps=7)
    measured = yardstick.measure(network)
    assert measured.sqnr == output_sqnr(reference, network, yardstick.calls)
    assert measured.psnr == endpoint_psnr(sampler(reference).images, sampler(network).images)
    # An error of 5 % of the output is 20 log10(20) dB at every timestep.
    assert measured.sqnr.pooled_db == pytest.approx(20 * math.log10(20), abs=1e-4)


def test_the_error_has_one_entry_a_step_and_is_zero_for_the_reference_itself() -> None:
    measured = Yardstick(Network(), sampler).measure(Network())
    assert measured.error_by_step == (0.0,) * 7
    assert measured.psnr.median_db == math.inf


def test_guided_sampling_is_measured_with_its_contexts() -> None:
    context = torch.ones(3, 2, 5)

    def guided(unet: Any) -> Trajectory:
        return sample_ddim_guided(
            unet,
            DDIMScheduler(clip_sample=False),
            NOISE,
            context=context,
            empty_context=torch.zeros(1, 2, 5),
            num_inference_steps=4,
            keep_steps=True,
        )

    yardstick = Yardstick(Network(), guided, num_timesteps=2)
    assert yardstick.rows == 2 * 2 * 3  # two calls, two branches, three images
    assert yardstick.measure(Network(0.1)).sqnr.pooled_db < 25


def test_a_sampler_without_steps_is_refused() -> None:
    with pytest.raises(InputError, match="keep_steps=True"):
        Yardstick(Network(), lambda unet: sampler(unet, keep_steps=False))
