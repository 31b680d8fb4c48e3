"""A plain list of calls is a calibration set too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.errors import InputError


def test_calls_without_timestep_are_taken() -> None:
    data = CalibrationSet.from_samples([((torch.ones(2, 3, 4, 4),), {}), ((torch.zeros(1, 3, 4, 4),), {})])
    batches = list(data.batches(8))
    assert (len(data), data.timesteps, [(x.timestep, x.size) for x in batches]) == (3, (), [(None, 3)])
    assert data.row_timesteps.isnan().all()
    assert data.split(0.34)[1].timesteps == ()


def test_samples_are_copied() -> None:
    x = torch.ones(2, 3)
    data = CalibrationSet.from_samples([((x, torch.tensor(1)), {})])
    x.zero_()
    assert data.gather([0, 1])[0][0].eq(1).all()


def test_timesteps_can_be_binned() -> None:
    calls = [((torch.full((1, 2), float(i)), torch.tensor([i / 10], dtype=torch.float64)), {}) for i in range(10)]
    data = CalibrationSet.from_samples(calls, num_timesteps=2)
    assert data.timesteps == (0.2, 0.7)
    (batch, _) = data.batches(8)
    # The batch goes by its bin; the model still gets the timesteps that it was called with.
    torch.testing.assert_close(batch.args[1], torch.arange(5.0).double() / 10)


@pytest.mark.parametrize(
    ("sample", "match"),
    [(torch.ones(2, 3), "sample 0 is a Tensor"), ((torch.ones(2, 3), 1), "want "), (((1,), {}), "batch dimension")],
)
def test_what_is_no_call_is_refused(sample: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        CalibrationSet.from_samples([sample])
    with pytest.raises(InputError, match="num_timesteps=0"):
        CalibrationSet.from_samples([], num_timesteps=0)
