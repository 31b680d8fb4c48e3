"""The range without its outermost values."""

import torch
from torch import Tensor

from qdiff_fx.errors import ConfigError
from qdiff_fx.numerics.affine import QParams, qparams_from_range
from qdiff_fx.numerics.spec import QuantSpec
from qdiff_fx.observers.sampling import SamplingObserver


class PercentileObserver(SamplingObserver):
    """Covers the values between the (100 - p)th and the p-th percentile of the sample.

    Args:
      spec: the grid to fit.
      seed: of the sample.
      percentile: p, in (50, 100].
    """

    def __init__(self, spec: QuantSpec, *, seed: int = 0, percentile: float = 99.9) -> None:
        super().__init__(spec, seed=seed)
        if not 50.0 < percentile <= 100.0:
            raise ConfigError(f"percentile={percentile}: want a number in (50, 100]")
        self.percentile = percentile

    def _fit(self, values: Tensor) -> QParams:
        # kthvalue, not quantile: no interpolation, no limit on the number of values.
        count = values.shape[-1]
        skipped = min(int(count * (1.0 - self.percentile / 100.0)), (count - 1) // 2)
        values = values.to(torch.float32)
        lowest = values.kthvalue(1 + skipped, dim=-1).values
        highest = values.kthvalue(count - skipped, dim=-1).values
        # Almost all values equal (zero, as a rule): what is left has no span, and the few others are all there is.
        flat = lowest.clamp(max=0.0) == highest.clamp(min=0.0)
        lowest = torch.where(flat, self.minimum, lowest)
        highest = torch.where(flat, self.maximum, highest)
        return qparams_from_range(lowest, highest, self.spec)
