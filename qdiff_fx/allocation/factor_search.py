"""Search the channel factor of one quantized tensor: candidates, and what the layers that read it make of each.

m is the smoothing factor max|x_c|^a / max|W_c|^(1 - a) (SmoothQuant, Xiao et al. 2022, eq. 4); a is searched. At 4 bits
a shift k_c in 0..3 takes up to 8x of the factor: the 4-bit grid then sees m_c * 2^-k_c, which is exact in the folded
int8 weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qdiff_fx.allocation.factor_errors import Errors, Reader, input_channel_maxima, layer_output
from qdiff_fx.allocation.learned_factors import refine_factor
from qdiff_fx.fake_quantize import ActivationQuantizer, WeightQuantizer
from qdiff_fx.numerics.affine import QParams, along_axis, fake_quantize
from qdiff_fx.numerics.search import search_mse
from qdiff_fx.numerics.weights import MAXIMUM_SHIFT, grid_weight

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SILENT = 2.0**-10
"""A channel that was silent in calibration counts as this share of the layer's median maximum."""

REDRAWN_GAIN_DB = 2.0
"""What a factor must gain where it rounds weights of fewer than 8 bits anew. Another draw of the same rounding errors
moves the end point by as much, whatever the layer's own error says (docs/decisions/070)."""

_SEARCHED_VALUES = 65536
_COARSE_VALUES, _COARSE_RANGES, _COARSE_ROWS = 8192, 10, 3
"""While candidates are compared: values and clipping ranges searched, and every n-th row; the winner gets all."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A factor [C], the shifts [C] that 4-bit weights take of it, the exponent that it started from; learned or not."""

    factor: Tensor
    shift: Tensor | None
    exponent: float
    learned: bool = False


def smoothing_factor(input_maxima: Tensor, weight_maxima: Tensor, exponent: float) -> Tensor:
    """max|x_c|^a / max|W_c|^(1 - a) with geometric mean 1; finite and positive for silent channels too.

    Args:
      input_maxima, weight_maxima: [C], >= 0.
      exponent: a in [0, 1].
    """
    inputs, weights = _audible(input_maxima), _audible(weight_maxima)
    logarithm = exponent * torch.log2(inputs) - (1.0 - exponent) * torch.log2(weights)
    return torch.exp2(logarithm - logarithm.mean()).to(torch.float32)


def channel_shifts(factor: Tensor) -> Tensor:
    """k_c in 0..3 such that m_c * 2^-k_c varies least over the channels, [C] uint8.

    Shifts count up from the smallest factor, or from half the median one where the spread is more than they cover.
    """
    logarithm = torch.log2(factor)
    anchor = torch.maximum(logarithm.min(), logarithm.median() - 1.0)
    return torch.round(logarithm - anchor).clamp(0, MAXIMUM_SHIFT).to(torch.uint8)


def _audible(maxima: Tensor) -> Tensor:
    """Maxima with silent channels raised to a small share of the median."""
    maxima = maxima.to(torch.float64)
    heard = maxima[maxima > 0]
    floor = float(heard.median()) * SILENT if heard.numel() else 1.0
    return maxima.clamp(min=floor)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best factor for some readers of a tensor; `candidate` is None where none beats "off".

    Args:
      off: errors without a factor.
      errors: with what was chosen.
      rounded: the tensor on the chosen grid.
      qparams: of the input; for "off" the grid that it had.
      fitted: weight quantizers under the factor, one a reader; the present ones for "off".
    """

    candidate: Candidate | None
    off: Errors
    errors: Errors
    rounded: Tensor
    qparams: QParams
    fitted: tuple[WeightQuantizer, ...]

    @property
    def gain_db(self) -> float:
        """How much lower the joint error is than without a factor."""
        if self.candidate is None:
            return 0.0
        return 10.0 * math.log10(max(self.off.joint, 1e-30) / max(self.errors.joint, 1e-30))

    def install(self, quantizer: ActivationQuantizer, readers: Sequence[Reader]) -> None:
        """Make it the grid of `quantizer` and of the readers' weights; "off" takes a factor away that came since."""
        factor = None if self.candidate is None else self.candidate.factor
        install_factor(quantizer, factor, self.qparams, readers, self.fitted)


def install_factor(
    quantizer: ActivationQuantizer,
    factor: Tensor | None,
    qparams: QParams,
    readers: Sequence[Reader],
    fitted: Sequence[WeightQuantizer],
) -> None:
    """Give a tensor's quantizer a factor with its grid, and its readers' quantizers what was fitted under it."""
    quantizer.channel_factor = factor
    quantizer.set_qparams(qparams)
    for reader, item in zip(readers, fitted, strict=True):
        reader.quantizer.channel_factor, reader.quantizer.channel_shift = item.channel_factor, item.channel_shift
        reader.quantizer.scale, reader.quantizer.zero_point = item.scale, item.zero_point


@torch.no_grad()
def search_factor(
    quantizer: ActivationQuantizer, x: Tensor, readers: Sequence[Reader], *, shifts: bool = True, iterations: int = 0
) -> Found:
    """Judge every candidate for the tensor `x` by what `readers` make of it; "off" wins ties. Nothing is installed.

    Where a reader has a weight of fewer than 8 bits, "off" also wins against less than `REDRAWN_GAIN_DB`.

    Args:
      shifts: also try candidates with channel shifts where a reader has 4-bit weights.
      iterations: steps of learning from the best candidate on; the result is kept only where it wins.
    """
    axis = quantizer.channel_axis % x.ndim
    targets = [layer_output(reader.call, x, reader.weight) for reader in readers]
    plain = tuple(reader.quantizer for reader in readers)
    rounded_plain = fake_quantize(x, quantizer.scale, quantizer.zero_point, quantizer.spec)
    off = Errors.of(readers, targets, x, rounded_plain, plain)

    def judge(candidate: Candidate, *, coarse: bool) -> Found:
        rows = slice(None, None, _COARSE_ROWS if coarse else 1)
        qparams = _fit_input(quantizer, candidate.factor, x[rows], axis, coarse=coarse)
        rounded = fake_quantize(
            x[rows],
            qparams.scale,
            qparams.zero_point,
            quantizer.spec,
            channel_factor=along_axis(candidate.factor, x.ndim, axis),
        )
        fitted = tuple(_fit_weight(reader, candidate, coarse=coarse) for reader in readers)
        errors = Errors.of(readers, [y[rows] for y in targets], x[rows], rounded, fitted)
        return Found(candidate=candidate, off=off, errors=errors, rounded=rounded, qparams=qparams, fitted=fitted)

    best = min(_candidates(quantizer, readers, shifts), key=lambda item: judge(item, coarse=True).errors.score)
    found = judge(best, coarse=False)
    if iterations:
        factor = refine_factor(best.factor, quantizer, found.qparams, readers, found.fitted, x, iterations)
        learned = judge(replace(best, factor=factor, learned=True), coarse=False)
        found = min(found, learned, key=lambda item: item.errors.score)
    redrawn = any(reader.quantizer.spec.bits < 8 for reader in readers)
    wanted = 10.0 ** (-REDRAWN_GAIN_DB / 10.0) if redrawn else 1.0
    if found.errors.score < off.score and found.errors.joint <= wanted * off.joint:
        return found
    before = QParams(quantizer.scale, quantizer.zero_point)
    return Found(candidate=None, off=off, errors=off, rounded=rounded_plain, qparams=before, fitted=plain)


def _candidates(quantizer: ActivationQuantizer, readers: Sequence[Reader], shifts: bool) -> Iterator[Candidate]:
    maxima = torch.stack([input_channel_maxima(reader) for reader in readers]).amax(dim=0)
    has_w4 = any(reader.quantizer.spec.bits <= 4 for reader in readers)
    for exponent in EXPONENTS:
        factor = smoothing_factor(quantizer.statistics.channel_maxima.to(maxima.device), maxima, exponent)
        yield Candidate(factor=factor, shift=None, exponent=exponent)
        if shifts and has_w4:
            yield Candidate(factor=factor, shift=channel_shifts(factor), exponent=exponent)


def _fit_input(quantizer: ActivationQuantizer, factor: Tensor, x: Tensor, axis: int, *, coarse: bool) -> QParams:
    """The grid of x / m, searched on a sample of it; its range is that of everything that was observed."""
    seen = (x.to(torch.float32) / along_axis(factor, x.ndim, axis)).flatten()
    lowest, highest = seen.min(), seen.max()
    observed = (quantizer.statistics.channel_maxima.to(factor.device) / factor).max()
    if highest >= -lowest:
        highest = torch.maximum(highest, observed)
    else:
        lowest = torch.minimum(lowest, -observed)
    values, ranges = (_COARSE_VALUES, _COARSE_RANGES) if coarse else (_SEARCHED_VALUES, 80)
    step = max(1, seen.numel() // values)
    return search_mse(seen[::step], quantizer.spec, candidates=ranges, minimum=lowest, maximum=highest)


def _fit_weight(reader: Reader, candidate: Candidate, *, coarse: bool) -> WeightQuantizer:
    """A quantizer like the reader's, fitted under the candidate's factor; coarsely where it is only compared."""
    own = reader.quantizer
    fitted = own.unfitted()
    fitted.channel_factor = candidate.factor
    fitted.channel_shift = candidate.shift if own.spec.bits <= 4 else None
    if not coarse:
        fitted.fit(reader.weight)
        return fitted
    seen = grid_weight(
        reader.weight.detach(),
        channel_factor=fitted.channel_factor,
        channel_shift=fitted.channel_shift,
        groups=fitted.groups,
    )
    qparams = search_mse(seen.flatten(1), own.spec, candidates=_COARSE_RANGES)
    fitted.scale, fitted.zero_point, fitted.calibrated = qparams.scale, qparams.zero_point, True
    return fitted
