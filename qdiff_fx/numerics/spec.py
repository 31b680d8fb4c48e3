"""The integer grids that qdiff_fx quantizes to."""

from __future__ import annotations

from dataclasses import dataclass

from qdiff_fx.errors import QuantSpecError


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """An integer grid: which codes exist and whether real zero may sit off code 0.

    Args:
      bits: width of a code, 2..8.
      signed: codes in [-2^(bits-1), 2^(bits-1) - 1] if true, else [0, 2^bits - 1].
      symmetric: the zero point is fixed at 0.
      narrow: drop the lowest code (signed only), so that the grid is symmetric about 0, as int8 kernels need.
      per_channel: one scale for each index of axis 0 (output channels of a weight) instead of one for the tensor.
    """

    bits: int
    signed: bool = False
    symmetric: bool = False
    narrow: bool = False
    per_channel: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise QuantSpecError(f"bits={self.bits!r}: want an integer in 2..8")
        if self.narrow and not (self.signed and self.symmetric):
            raise QuantSpecError(f"{self}: narrow needs signed=True and symmetric=True")

    @property
    def qmin(self) -> int:
        """Lowest code."""
        return (-int(2 ** (self.bits - 1)) if self.signed else 0) + int(self.narrow)

    @property
    def qmax(self) -> int:
        """Highest code."""
        return int(2 ** (self.bits - 1)) - 1 if self.signed else int(2**self.bits) - 1


def weight_spec(bits: int) -> QuantSpec:
    """The grid of a conv or linear weight: symmetric in [-127, 127] at 8 bits, asymmetric unsigned below.

    Kernels have no weight zero point; below 8 bits the zero point folds into int8 exactly
    (|code - zero_point| <= 2^bits - 1), at 8 bits it would not fit.
    """
    if bits == 8:
        return QuantSpec(bits=8, signed=True, symmetric=True, narrow=True, per_channel=True)
    return QuantSpec(bits=bits, per_channel=True)


def activation_spec(bits: int) -> QuantSpec:
    """The grid of a conv or linear input and of q, k, v: unsigned with a zero point, per tensor."""
    return QuantSpec(bits=bits)


def probability_spec(bits: int) -> QuantSpec:
    """The grid of attention probabilities: unsigned, zero point 0; its scale is 1 / (2^bits - 1)."""
    return QuantSpec(bits=bits, symmetric=True)
