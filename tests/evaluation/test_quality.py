"""Output SQNR, end-point PSNR and trajectory error against figures worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdiff_fx.errors import InputError, NonFiniteError
from qdiff_fx.evaluation.quality import endpoint_psnr, output_sqnr, trajectory_error
from qdiff_fx.numerics.metrics import sqnr_db


def batch(timestep: float | None, value: float = 1.0, size: int = 4) -> Any:
    return SimpleNamespace(args=(torch.full((size, 1, 2, 2), value), timestep), kwargs={}, timestep=timestep)


def reference(sample: Tensor, timestep: float | None) -> Tensor:
    return sample


def off_by(error: Callable[[float], float]) -> Callable[..., tuple[Tensor]]:
    return lambda sample, timestep: (sample + error(timestep),)


def test_sqnr_pools_energies_and_takes_the_median_over_timesteps() -> None:
    errors = {0: 1.0, 500: 0.1, 999: 0.01}
    result = output_sqnr(reference, off_by(errors.__getitem__), [batch(999), batch(0), batch(500)])
    assert list(result.by_timestep) == [0, 500, 999]
    # 20 log10(1 / error); the inputs are fp32, 0.01 keeps seven digits of it through 1 + 0.01.
    assert list(result.by_timestep.values()) == pytest.approx([0, 20, 40], abs=1e-3)
    assert result.median_db == pytest.approx(20, abs=1e-3)
    assert result.pooled_db == pytest.approx(10 * math.log10(3 / (1 + 0.01 + 0.0001)), abs=1e-3)


def test_the_error_of_the_median_falls_with_the_rows_and_with_their_likeness() -> None:
    def error(rows: int, spread: float) -> float:
        generator = torch.Generator().manual_seed(0)
        batches = [
            batch(timestep, float(torch.exp(spread * torch.randn((), generator=generator))), size=1)
            for timestep in (0, 1, 2)
            for _ in range(rows)
        ]
        return output_sqnr(reference, off_by(lambda _: 0.1), batches).median_error_db()

    assert error(64, 0.5) < 0.7 * error(8, 0.5), "a third, but for what eight rows know of their own spread"
    assert 0.0 < error(8, 0.05) < 0.3 * error(8, 0.5)
    assert error(1, 0.5) < 1e-9, "one row tells nothing"
    assert output_sqnr(reference, reference, [batch(0), batch(0)]).median_error_db() == 0.0


def test_batches_of_one_timestep_count_by_their_energy() -> None:
    split = output_sqnr(reference, off_by(lambda _: 0.1), [batch(7, 1.0, size=3), batch(7, 2.0, size=1)])
    rows = torch.tensor([1.0, 1.0, 1.0, 2.0])
    assert split.by_timestep == {7: pytest.approx(sqnr_db(rows, rows + 0.1), abs=1e-9)}


def test_equal_outputs_have_infinite_sqnr_and_calls_without_timestep_form_one_group() -> None:
    result = output_sqnr(reference, reference, [batch(None), batch(None)])
    assert (result.pooled_db, result.median_db, result.by_timestep) == (math.inf, math.inf, {-1.0: math.inf})


def test_sqnr_runs_both_networks_in_eval_mode_without_gradients() -> None:
    class Noisy(nn.Module):
        def forward(self, sample: Tensor, timestep: float) -> Tensor:
            assert not torch.is_grad_enabled()
            return sample + float(self.training)

    first, second = Noisy().train(), Noisy().eval()
    assert output_sqnr(first, second, [batch(1)]).pooled_db == math.inf
    assert first.training


def test_energies_far_apart_are_summed_in_fp64() -> None:
    # In fp32 the second batch's energy, 4e-8 of the first, would vanish from the sum.
    result = output_sqnr(reference, off_by(lambda t: 1.0 if t == 1 else 2e-4), [batch(1), batch(2, 0.0)])
    assert result.pooled_db == pytest.approx(10 * math.log10(1 / (1 + 4e-8)), abs=1e-9)


def test_sqnr_without_batches_is_refused() -> None:
    with pytest.raises(InputError, match="no held-out batches"):
        output_sqnr(reference, reference, [])


def test_outputs_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match="timestep 3"):
        output_sqnr(reference, lambda sample, timestep: sample[:1], [batch(3)])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_output_that_is_not_finite_names_network_and_timestep(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="compared network's output at timestep 3"):
        output_sqnr(reference, off_by(lambda _: bad), [batch(3)])


def test_psnr_is_the_median_over_samples_with_range_two() -> None:
    images = torch.zeros(3, 1, 2, 2)
    others = images + torch.tensor([0.2, 0.02, 1.0])[:, None, None, None]
    result = endpoint_psnr(images, others)
    # 20 log10(2 / error)
    assert result.by_sample == pytest.approx([20, 40, 20 * math.log10(2)], abs=1e-4)
    assert result.median_db == pytest.approx(20, abs=1e-4)


def test_psnr_clamps_as_a_viewer_does() -> None:
    assert endpoint_psnr(torch.full((1, 1, 2, 2), 1.5), torch.full((1, 1, 2, 2), 9.0)).median_db == math.inf


def test_psnr_refuses_another_shape_and_images_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="want the same"):
        endpoint_psnr(torch.zeros(2, 1, 2, 2), torch.zeros(3, 1, 2, 2))
    with pytest.raises(NonFiniteError, match="diverged"):
        endpoint_psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), math.inf))


def test_trajectory_error_is_relative_to_the_reference_at_each_step() -> None:
    steps = [torch.full((2, 2), 2.0), torch.full((2, 2), 4.0)]
    assert trajectory_error(steps, [steps[0] + 1, steps[1]]) == [0.5, 0.0]


def test_trajectories_of_another_length_or_shape_are_refused() -> None:
    with pytest.raises(InputError, match="keep_steps"):
        trajectory_error([torch.ones(2)], [])
    with pytest.raises(InputError, match="step 0"):
        trajectory_error([torch.ones(2)], [torch.ones(3)])
