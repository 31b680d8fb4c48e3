"""One grid for each part of a channel cat."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from qdiff_fx.errors import ConfigError, InputError
from qdiff_fx.numerics.affine import QParams
from qdiff_fx.numerics.spec import QuantSpec
from qdiff_fx.observers.base import Observer
from qdiff_fx.observers.mse import MSEObserver


class SplitObserver(Observer):
    """A child observer for each range of channels (Q-Diffusion, section 4.2), for cats that can't be rewritten.

    Args:
      spec: the grid of every part; per tensor.
      seed: of the children's samples; part i gets seed + i.
      sections: channels of each part, e.g. (256, 128); empty: one part, and an ordinary scalar grid.
      channel_axis: where the channels are.
      child: class of the children.
    """

    parts: nn.ModuleList

    def __init__(
        self,
        spec: QuantSpec,
        *,
        seed: int = 0,
        sections: Sequence[int] = (),
        channel_axis: int = 1,
        child: type[Observer] = MSEObserver,
    ) -> None:
        super().__init__(spec, seed=seed)
        if any(section < 1 for section in sections):
            raise ConfigError(f"sections={tuple(sections)}: want channel counts of 1 or more")
        if sections and spec.per_channel:
            raise ConfigError(
                f"sections={tuple(sections)} with {spec}: want a per-tensor spec; split the weight instead"
            )
        self.sections = tuple(sections)
        self.channel_axis = channel_axis
        self.parts = nn.ModuleList(child(spec, seed=seed + index) for index in range(max(1, len(self.sections))))

    def _collect(self, x: Tensor, minimum: Tensor, maximum: Tensor) -> None:
        for index, (part, values) in enumerate(zip(self._children(), self._parts_of(x), strict=True)):
            part.name = f"{self._label}, part {index}"
            part.observe(values)

    def _parts_of(self, x: Tensor) -> Sequence[Tensor]:
        if not self.sections:
            return (x,)
        axis = self.channel_axis
        if not -x.ndim <= axis < x.ndim or x.shape[axis] != sum(self.sections):
            raise InputError(
                f"{self._label}: shape {tuple(x.shape)}, want {sum(self.sections)} channels on axis {axis}, "
                f"as sections={self.sections} say"
            )
        return torch.split(x, list(self.sections), dim=axis)

    def _children(self) -> list[Observer]:
        return [part for part in self.parts if isinstance(part, Observer)]

    def part_qparams(self) -> tuple[QParams, ...]:
        """A scalar grid for each part, in channel order. Raises CalibrationError if nothing was observed."""
        return tuple(part.qparams() for part in self._children())

    def _qparams(self) -> QParams:
        """Of a split tensor: vectors over its channels, [C]."""
        grids = self.part_qparams()
        if not self.sections:
            return grids[0]
        counts = torch.tensor(self.sections, device=grids[0].scale.device)
        return QParams(
            torch.stack([grid.scale for grid in grids]).repeat_interleave(counts),
            torch.stack([grid.zero_point for grid in grids]).repeat_interleave(counts),
        )

    def section_ranges(self) -> list[tuple[int, int, float, float]]:
        """(first channel, end channel, minimum, maximum) of each part, for reports."""
        ends = list(accumulate(self.sections))
        starts = [0, *ends[:-1]]
        return [
            (start, end, float(part.minimum), float(part.maximum))
            for start, end, part in zip(starts, ends, self._children(), strict=True)
        ]

    def range_ratio(self) -> float:
        """Span of the widest part over span of the narrowest; 1 for one part, inf if a part is constant zero."""
        spans = [float(part.maximum.clamp(min=0.0) - part.minimum.clamp(max=0.0)) for part in self._children()]
        if max(spans) == min(spans):
            return 1.0
        return max(spans) / min(spans) if min(spans) > 0 else float("inf")
