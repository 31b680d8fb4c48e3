"""Channel maxima and ranges by timestep."""

import math

import pytest
import torch
from torch import Tensor

from qdiff_fx.errors import InputError
from qdiff_fx.observers import ActivationStatistics, TimestepRange
from qdiff_fx.observers.statistics import MAXIMUM_TIMESTEPS


def images(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_ranges_and_channel_maxima_by_timestep_equal_a_loop_over_rows() -> None:
    statistics, times = ActivationStatistics(1), torch.tensor([999, 0, 500, 999])
    data = [images(4, seed) for seed in range(3)]
    for x in data:
        statistics.update(x, times)
    everything, every_time = torch.cat(data), times.repeat(3)
    assert torch.equal(statistics.channel_maxima, everything.abs().amax(dim=(0, 2, 3)))
    expected = []
    for index, time in enumerate([0.0, 500.0, 999.0]):
        rows = everything[every_time == time]
        expected.append(TimestepRange(timestep=time, minimum=float(rows.min()), maximum=float(rows.max())))
        assert torch.equal(statistics.timestep_channel_maxima[index], rows.abs().amax(dim=(0, 2, 3)))
        assert statistics.rows[index] == rows.shape[0]
    assert statistics.ranges() == expected


def test_moments_of_many_batches_are_those_of_all_at_once() -> None:
    statistics = ActivationStatistics(1)
    constants = torch.tensor([0.0, 50.0, 1e4]).view(1, 3, 1, 1)
    data = [images(rows, rows) * rows + constants for rows in (1, 4, 2)]
    for x in data:
        statistics.update(x)
    everything = torch.cat(data).double()
    variances, means = torch.var_mean(everything, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(statistics.channel_means, means, rtol=1e-6, atol=1e-6)
    # Squares of fp32 values around 1e4 are off by 2^-24 of the value: 1e-3 absolute in a deviation of 3.
    torch.testing.assert_close(statistics.channel_variances, variances, rtol=1e-3, atol=0.0)
    expected = float((means.square() + variances).sum() / variances.sum())
    assert statistics.offset_ratio == pytest.approx(expected, rel=1e-3)


def test_offsets_are_known_of_tensors_with_positions_that_vary() -> None:
    for x in (torch.randn(4, 3), torch.ones(2, 3, 4, 4)):
        statistics = ActivationStatistics(1)
        statistics.update(x)
        assert math.isnan(statistics.offset_ratio)


@pytest.mark.parametrize("axis", [1, -1, 2])
def test_channels_may_lie_on_any_axis_but_the_rows(axis: int) -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    statistics = ActivationStatistics(axis)
    statistics.update(x, torch.tensor([1, 2]))
    assert torch.equal(statistics.channel_maxima, x.abs().movedim(axis, -1).flatten(0, -2).amax(dim=0))


def test_vectors_have_channels_only() -> None:
    statistics = ActivationStatistics(-1)
    statistics.update(torch.tensor([[1.0, -2.0], [-3.0, 0.5]]), torch.tensor([5, 6]))
    assert statistics.channel_maxima.tolist() == [3.0, 2.0]
    assert [entry.minimum for entry in statistics.ranges()] == [-2.0, -3.0]


def test_rows_that_are_a_multiple_of_the_batch_belong_to_its_timesteps_in_groups() -> None:
    statistics, x = ActivationStatistics(1), images(6)
    statistics.update(x, torch.tensor([10, 20]))
    assert [entry.maximum for entry in statistics.ranges()] == [float(x[:3].max()), float(x[3:].max())]


@pytest.mark.parametrize(
    "times", [None, torch.tensor([1, 2]), torch.tensor([])], ids=["none", "not divisible", "empty"]
)
def test_rows_without_a_timestep_count_for_the_totals_only(times: Tensor | None) -> None:
    statistics = ActivationStatistics(1)
    statistics.update(images(3), times)
    assert statistics.ranges() == []
    assert torch.equal(statistics.channel_maxima, images(3).abs().amax(dim=(0, 2, 3)))


def test_entries_are_bounded_and_nearest_timesteps_merge_without_losing_a_value() -> None:
    statistics, generator = ActivationStatistics(1), torch.Generator().manual_seed(0)
    lowest, highest = float("inf"), -float("inf")
    for _ in range(50):
        x = torch.randn(4, 3, 2, generator=generator)
        statistics.update(x, torch.rand(4, generator=generator) * 80.0)
        lowest, highest = min(lowest, float(x.min())), max(highest, float(x.max()))
    ranges = statistics.ranges()
    assert len(ranges) == MAXIMUM_TIMESTEPS and statistics.rows.sum() == 200
    assert min(entry.minimum for entry in ranges) == lowest
    assert max(entry.maximum for entry in ranges) == highest
    times = [entry.timestep for entry in ranges]
    assert times == sorted(times) and times[0] >= 0.0 and times[-1] <= 80.0
    assert torch.equal(statistics.timestep_channel_maxima.amax(dim=0), statistics.channel_maxima)


def test_at_most_64_integer_timesteps_stay_as_they_are() -> None:
    statistics = ActivationStatistics(1)
    for time in [*range(63, -1, -1), *range(64)]:
        statistics.update(torch.full((1, 2), float(time)), torch.tensor([time]))
    assert [entry.timestep for entry in statistics.ranges()] == list(range(64))
    assert [entry.maximum for entry in statistics.ranges()] == list(range(64))


def test_half_precision_is_read_exactly() -> None:
    statistics, x = ActivationStatistics(1), images(2).to(torch.bfloat16)
    statistics.update(x, torch.tensor([0, 1]))
    assert statistics.channel_maxima.dtype == torch.float32
    assert torch.equal(statistics.channel_maxima, x.float().abs().amax(dim=(0, 2, 3)))


def test_state_dict_round_trip_continues_where_it_stopped() -> None:
    statistics, restored = ActivationStatistics(1), ActivationStatistics(1)
    statistics.update(images(2), torch.tensor([0.25, 17.5]))
    restored.load_state_dict(statistics.state_dict())
    for each in (statistics, restored):
        each.update(images(2, seed=1), torch.tensor([17.5, 3.0]))
    assert restored.ranges() == statistics.ranges()
    assert torch.equal(restored.channel_maxima, statistics.channel_maxima)


def test_casting_the_model_does_not_round_statistics() -> None:
    statistics = ActivationStatistics(1)
    statistics.update(images(2), torch.tensor([0.123456789, 1.0], dtype=torch.float64))
    before = statistics.ranges()
    assert statistics.to(torch.bfloat16).ranges() == before


@pytest.mark.parametrize(
    ("axis", "shape"), [(0, (2, 3)), (1, (4,)), (-2, (2, 3)), (2, (2, 3)), (1, (0, 3)), (1, (2, 4, 4, 4))]
)
def test_tensors_without_these_channels_are_refused(axis: int, shape: tuple[int, ...]) -> None:
    statistics = ActivationStatistics(axis)
    statistics.register_buffer("channel_maxima", torch.ones(3))
    with pytest.raises(InputError, match="want"):
        statistics.update(torch.zeros(shape), None)
