"""An exponential average of batch ranges."""

import torch
from torch import Tensor

from qdiff_fx.errors import ConfigError
from qdiff_fx.numerics.affine import QParams, qparams_from_range
from qdiff_fx.numerics.spec import QuantSpec
from qdiff_fx.observers.base import Observer


class MovingAverageObserver(Observer):
    """Covers the exponential moving average of the batches' ranges.

    The only observer that depends on the order of the batches: the last few rule it. Shuffle the timesteps.

    Args:
      spec: the grid to fit.
      seed: unused, as nothing here is random.
      momentum: weight of the newest batch, in (0, 1].
    """

    average_minimum: Tensor
    average_maximum: Tensor

    def __init__(self, spec: QuantSpec, *, seed: int = 0, momentum: float = 0.1) -> None:
        super().__init__(spec, seed=seed)
        if not 0.0 < momentum <= 1.0:
            raise ConfigError(f"momentum={momentum}: want a number in (0, 1]")
        self.momentum = momentum
        self.register_buffer("average_minimum", torch.empty(0))
        self.register_buffer("average_maximum", torch.empty(0))

    def _collect(self, x: Tensor, minimum: Tensor, maximum: Tensor) -> None:
        if not self.observed:
            self.average_minimum, self.average_maximum = minimum, maximum
            return
        # In float64, as the difference of two huge float32 values may overflow.
        self.average_minimum = _blend(self.average_minimum, minimum, self.momentum)
        self.average_maximum = _blend(self.average_maximum, maximum, self.momentum)

    def _qparams(self) -> QParams:
        return qparams_from_range(self.average_minimum, self.average_maximum, self.spec)


def _blend(old: Tensor, new: Tensor, weight: float) -> Tensor:
    return torch.lerp(old.to(new.device, torch.float64), new.to(torch.float64), weight).to(torch.float32)
