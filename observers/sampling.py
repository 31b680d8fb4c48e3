"""Observers that look at values, not at ranges alone."""

import torch
from torch import Tensor

from qdiff_fx.errors import CalibrationError
from qdiff_fx.numerics.affine import QParams
from qdiff_fx.numerics.spec import QuantSpec
from qdiff_fx.observers.base import Observer
from qdiff_fx.observers.reservoir import Reservoir, extend


class SamplingObserver(Observer):
    """Keeps a bounded sample of the values of a tensor; of a per-channel tensor (a weight), a reference to all of it.

    A weight is observed once: `qparams()` reads it whole, keeps the answer and drops the reference, so that weights are
    neither copied nor stored with the statistics. A second weight replaces the first.
    Subclasses define `_fit`.
    """

    samples: Tensor
    offered: Tensor
    fitted_scale: Tensor
    fitted_zero_point: Tensor

    def __init__(self, spec: QuantSpec, *, seed: int = 0) -> None:
        super().__init__(spec, seed=seed)
        self._weight: Tensor | None = None
        self.register_buffer("samples", torch.empty(0))
        self.register_buffer("offered", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fitted_scale", torch.empty(0))
        self.register_buffer("fitted_zero_point", torch.empty(0, dtype=torch.int32))

    def _collect(self, x: Tensor, minimum: Tensor, maximum: Tensor) -> None:
        if self.spec.per_channel:
            self._weight = x
            return
        reservoir = Reservoir(self.samples, self.offered)
        self.samples, self.offered = extend(reservoir, x, seed=self.seed, batch=int(self.batches))

    def _qparams(self) -> QParams:
        if not self.spec.per_channel:
            return self._fit(self.samples)
        if self._weight is not None:
            self.fitted_scale, self.fitted_zero_point = self._fit(self._weight.flatten(1))
            self._weight = None
        if self.fitted_scale.shape == (0,):
            raise CalibrationError(f"{self._label}: restored before its weight was fitted; observe the weight again")
        return QParams(self.fitted_scale, self.fitted_zero_point)

    def _fit(self, values: Tensor) -> QParams:
        """The grid for `values` [N] or [C, N]."""
        raise NotImplementedError
