"""The whole range."""

from qdiff_fx.numerics.affine import QParams, qparams_from_range
from qdiff_fx.observers.base import Observer


class MinMaxObserver(Observer):
    """Covers everything seen: no value of the calibration set saturates."""

    def _qparams(self) -> QParams:
        return qparams_from_range(self.minimum, self.maximum, self.spec)
