"""What every observer does: keep the exact range, refuse NaN, know whether it has seen anything."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from qdiff_fx.errors import CalibrationError, InputError, NonFiniteError
from qdiff_fx.numerics.affine import QParams
from qdiff_fx.numerics.spec import QuantSpec
from qdiff_fx.observers.state import RunningState


class Observer(RunningState):
    """Collects statistics of one tensor over batches and turns them into a grid; it never rounds.

    Memory is bounded whatever the number of batches. Subclasses extend `_collect` and define `_qparams`.

    Attributes:
      name: of the layer, for error messages.
      spec: the grid to fit; axis 0 is the channel axis of a per-channel spec.
      seed: of every random choice.
      minimum, maximum: exact range seen so far, float32, [] or [C]; of shape [0] before the first batch.
      batches: how many times `observe` was called, int64 [].
    """

    minimum: Tensor
    maximum: Tensor
    batches: Tensor

    def __init__(self, spec: QuantSpec, *, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.seed = seed
        self.name = ""
        self.register_buffer("minimum", torch.empty(0))
        self.register_buffer("maximum", torch.empty(0))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @property
    def observed(self) -> bool:
        """Whether anything was observed."""
        return self.minimum.shape != (0,)

    @torch.no_grad()
    def observe(self, x: Float[Tensor, "..."]) -> None:
        """Take in one batch.

        Args:
          x: any shape and floating dtype, real units; [C, ...] with at least 2 dimensions for a per-channel spec.

        Raises:
          NonFiniteError: if `x` holds NaN or infinity, or values beyond float32.
          InputError: if `x` is empty or its channels differ from the batches before.
        """
        label = self._label
        if x.numel() == 0 or (self.spec.per_channel and x.ndim < 2):
            wanted = "[channels, ...] with values" if self.spec.per_channel else "at least one value"
            raise InputError(f"{label}: observed a tensor of shape {tuple(x.shape)}, want {wanted}")
        x = x.detach()
        minimum, maximum = x.flatten(1).aminmax(dim=1) if self.spec.per_channel else x.aminmax()
        minimum, maximum = minimum.to(torch.float32), maximum.to(torch.float32)
        # aminmax propagates NaN, so the range alone tells.
        if not bool((torch.isfinite(minimum) & torch.isfinite(maximum)).all()):
            raise NonFiniteError(
                f"{label}: NaN or infinity in its input (range [{float(minimum.min())}, {float(maximum.max())}]), "
                "want finite values; check the model's weights and the calibration inputs; run an fp16 model in fp32"
            )
        if self.observed and minimum.shape != self.minimum.shape:
            raise InputError(
                f"{label}: {minimum.numel()} channels, want {self.minimum.numel()} as in the batches before"
            )
        self._collect(x, minimum, maximum)
        if self.observed:
            # Statistics live where the data is: `.to` of the model may have come before they were made.
            minimum = torch.minimum(self.minimum.to(minimum.device), minimum)
            maximum = torch.maximum(self.maximum.to(maximum.device), maximum)
        self.minimum, self.maximum = minimum, maximum
        self.batches += 1

    def qparams(self) -> QParams:
        """Scale and zero point, [] or [C]. Raises CalibrationError if nothing was observed."""
        if not self.observed:
            raise CalibrationError(f"{self._label}: nothing was observed; run calibration data through the model first")
        with torch.no_grad():
            return self._qparams()

    @property
    def _label(self) -> str:
        return self.name or f"unnamed {type(self).__name__}"

    def _collect(self, x: Tensor, minimum: Tensor, maximum: Tensor) -> None:
        """Take in what the exact range does not tell; `self.minimum` and `self.batches` are still those before `x`."""

    @abstractmethod
    def _qparams(self) -> QParams:
        """Scale and zero point of what was observed."""

    def extra_repr(self) -> str:
        """The grid and the layer, for `print(model)`."""
        return f"name={self.name!r}, spec={self.spec}"
