"""What reports and later passes want to know of an activation: maxima by channel, ranges by timestep."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor

from qdiff_fx.errors import InputError
from qdiff_fx.observers.state import RunningState

MAXIMUM_TIMESTEPS = 64
"""Entries kept; past it the two nearest timesteps merge."""


@dataclass(frozen=True, kw_only=True)
class TimestepRange:
    """The range of an activation at a timestep.

    Args:
      timestep: as the scheduler counts them (or a noise level); the mean of its rows where timesteps were merged.
      minimum, maximum: over all rows seen at it, real units.
    """

    timestep: float
    minimum: float
    maximum: float


class ActivationStatistics(RunningState):
    """max |x| by channel, and range and channel maxima by timestep; an entry for each of at most 64 timesteps.

    Costs four reductions of `x` a batch. All state is in buffers, on the CPU until moved, and goes into `state_dict`.

    Attributes:
      channel_axis: of the tensors, never 0 (that one is the rows).
      channel_maxima: [C], max |x| over everything seen; [0] before the first batch.
      timesteps: [T], ascending, float64.
      rows: [T], rows seen at each, int64.
      minima, maxima: [T], range at each.
      timestep_channel_maxima: [T, C], max |x| by channel at each.
      positions: values of each channel that the next two count, int64.
      channel_means, channel_variances: [C], of tensors with positions, float64; [0] for embeddings, which differ from
        row to row alone.
    """

    channel_maxima: Tensor
    timesteps: Tensor
    rows: Tensor
    minima: Tensor
    maxima: Tensor
    timestep_channel_maxima: Tensor
    positions: Tensor
    channel_means: Tensor
    channel_variances: Tensor

    def __init__(self, channel_axis: int) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.register_buffer("channel_maxima", torch.empty(0))
        self.register_buffer("timesteps", torch.empty(0, dtype=torch.float64))
        self.register_buffer("rows", torch.empty(0, dtype=torch.int64))
        self.register_buffer("minima", torch.empty(0))
        self.register_buffer("maxima", torch.empty(0))
        self.register_buffer("timestep_channel_maxima", torch.empty(0, 0))
        self.register_buffer("positions", torch.zeros((), dtype=torch.int64))
        self.register_buffer("channel_means", torch.empty(0, dtype=torch.float64))
        self.register_buffer("channel_variances", torch.empty(0, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Float[Tensor, "..."], timesteps: Num[Tensor, " B"] | None = None) -> None:
        """Take in one batch.

        Args:
          x: [rows, ..., C, ...], finite (observers see to that).
          timesteps: [B], one for each group of rows / B neighbouring rows (attention folds its heads into the rows);
            None, or a number of rows that B does not divide: only `channel_maxima` learns from the batch.

        Raises:
          InputError: if `x` has no such channel axis, no values, or another number of channels than before.
        """
        axis = self.channel_axis % x.ndim if -x.ndim <= self.channel_axis < x.ndim else 0
        if axis == 0 or x.numel() == 0:
            raise InputError(
                f"statistics of a tensor {tuple(x.shape)}: want values, and channels on axis {self.channel_axis}"
            )
        channels = x.shape[axis]
        if self.channel_maxima.shape not in ((0,), (channels,)):
            raise InputError(f"statistics of {channels} channels: want {self.channel_maxima.shape[0]}, as before")
        others = [dimension for dimension in range(1, x.ndim) if dimension != axis]
        lowest = (x.amin(dim=others) if others else x).to(self.channel_maxima.device, torch.float32)
        highest = (x.amax(dim=others) if others else x).to(self.channel_maxima.device, torch.float32)
        absolute = torch.maximum(-lowest, highest)
        total = absolute.amax(dim=0)
        self.channel_maxima = torch.maximum(self.channel_maxima, total) if self.channel_maxima.numel() else total
        if others:
            self._take_moments(x, [0, *others])
        if timesteps is None or timesteps.numel() == 0 or x.shape[0] % timesteps.numel():
            return
        times = timesteps.detach().flatten().to(self.timesteps.device, torch.float64)
        repeats = x.shape[0] // times.numel()
        self._merge(
            times.repeat_interleave(repeats),
            torch.ones_like(lowest[:, 0], dtype=torch.int64),
            lowest.amin(dim=1),
            highest.amax(dim=1),
            absolute,
        )

    @property
    def offset_ratio(self) -> float:
        """Energy over variance, summed over the channels; 1 where channels lie around zero, nan where unknown.

        The constant that each channel lies around costs a floating type digits, and carries nothing that a
        normalisation or a bias behind it does not take away.
        """
        if not self.channel_means.numel():
            return math.nan
        variance = float(self.channel_variances.sum())
        return (float(self.channel_means.square().sum()) + variance) / variance if variance > 0.0 else math.nan

    def _take_moments(self, x: Tensor, dimensions: list[int]) -> None:
        """Merge means and variances over `dimensions` (Chan, Golub and LeVeque, 1979)."""
        device = self.channel_means.device
        moments = torch.var_mean(x.to(torch.float32), dim=dimensions, correction=0)
        variances, means = (moment.to(device, torch.float64) for moment in moments)
        count = x.numel() // means.numel()
        if self.channel_means.numel():
            share = count / (count + int(self.positions))
            shift = means - self.channel_means
            means = self.channel_means + share * shift
            variances = torch.lerp(self.channel_variances, variances, share) + share * (1.0 - share) * shift.square()
        self.positions = self.positions + count
        self.channel_means, self.channel_variances = means, variances

    def _merge(self, times: Tensor, rows: Tensor, minima: Tensor, maxima: Tensor, channel_maxima: Tensor) -> None:
        if self.timesteps.numel():
            times = torch.cat([self.timesteps, times])
            rows = torch.cat([self.rows, rows])
            minima, maxima = torch.cat([self.minima, minima]), torch.cat([self.maxima, maxima])
            channel_maxima = torch.cat([self.timestep_channel_maxima, channel_maxima])
        distinct, group = torch.unique(times, return_inverse=True)
        group = _at_most(distinct, group)
        count = int(group.max()) + 1
        self.rows = rows.new_zeros(count).index_add(0, group, rows)
        weighted = times.new_zeros(count).index_add(0, group, times * rows)
        # A timestep that was not merged keeps its value to the bit, so that it is found again.
        first = times.new_full((count,), float("inf")).scatter_reduce(0, group, times, "amin")
        last = times.new_full((count,), float("-inf")).scatter_reduce(0, group, times, "amax")
        self.timesteps = torch.where(first == last, first, weighted / self.rows)
        self.minima = minima.new_full((count,), float("inf")).scatter_reduce(0, group, minima, "amin")
        self.maxima = maxima.new_full((count,), float("-inf")).scatter_reduce(0, group, maxima, "amax")
        empty = channel_maxima.new_zeros(count, channel_maxima.shape[1])
        index = group[:, None].expand_as(channel_maxima)
        self.timestep_channel_maxima = empty.scatter_reduce(0, index, channel_maxima, "amax")

    def ranges(self) -> list[TimestepRange]:
        """The range at each timestep, ascending."""
        columns = zip(self.timesteps.tolist(), self.minima.tolist(), self.maxima.tolist(), strict=True)
        return [TimestepRange(timestep=time, minimum=low, maximum=high) for time, low, high in columns]


def _at_most(distinct: Tensor, group: Tensor) -> Tensor:
    """`group` with the nearest of the `distinct` ascending values joined until MAXIMUM_TIMESTEPS groups are left."""
    surplus = distinct.shape[0] - MAXIMUM_TIMESTEPS
    if surplus <= 0:
        return group
    joined = torch.zeros(distinct.shape[0], dtype=torch.int64, device=distinct.device)
    joined[1:] = 1
    joined[1 + distinct.diff().topk(surplus, largest=False).indices] = 0
    return joined.cumsum(0)[group]
