"""Confidence intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from qdiff_fx.errors import InputError

CONFIDENCE = 0.95
_T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t for 1 to 10 degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds and where it is expected to lie, with 95 % confidence under a normal law (Student's t).

    Args:
      mean: over the seeds.
      low, high: ends of the interval; None for a single seed, which tells nothing of the spread.
      values: one a seed, in the order of the seeds.
    """

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float]) -> Interval:
        """Of independent figures, one a seed. Raises InputError if there are none or one is not finite."""
        if not values or not all(math.isfinite(value) for value in values):
            raise InputError(f"figures {list(values)}: want one finite figure a seed")
        middle = mean(values)
        if len(values) == 1:
            return cls(mean=middle, low=None, high=None, values=tuple(values))
        quantile = _T_QUANTILES[len(values) - 2] if len(values) - 2 < len(_T_QUANTILES) else _T_QUANTILES[-1]
        reach = quantile * stdev(values) / math.sqrt(len(values))
        return cls(mean=middle, low=middle - reach, high=middle + reach, values=tuple(values))

    def text(self, digits: int = 2) -> str:
        """As "1.23 ± 0.04", or the mean alone for one seed."""
        if self.high is None:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.high - self.mean:.{digits}f}"
