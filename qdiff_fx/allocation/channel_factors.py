"""Fold per-channel factors into weights and activation steps, where that lowers a layer's output error.

For input channel c a factor m_c > 0: the activation's step becomes s_x * m_c, the weight is quantized as W[:, c] * m_c.
At run time it costs nothing (the quantize step multiplies with a vector instead of a scalar). m is the smoothing factor
max|x_c|^a / max|W_c|^(1 - a) (SmoothQuant, Xiao et al. 2022, eq. 4); a is searched layer by layer. At 4 bits a shift
k_c in 0..3 takes up to 8x of the factor: the 4-bit grid then sees m_c * 2^-k_c, exact in the folded int8 weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.allocation.probe import Probe, flat_inputs, spread_rows
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.fake_quantize import ActivationQuantizer, QuantizerMode, WeightQuantizer
from qdiff_fx.graph.edit import LayerCall, get_tensor, layer_call
from qdiff_fx.graph.meta import LAYER
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.numerics.affine import QParams, along_axis, fake_quantize
from qdiff_fx.numerics.search import search_mse
from qdiff_fx.numerics.weights import MAXIMUM_SHIFT, grid_weight

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SILENT = 2.0**-10
"""A channel that was silent in calibration counts as this share of the layer's median maximum."""

WEIGHT_EMPHASIS = 8.0
"""A weight's error acts alike at every sampling step and adds up, an input's differs and averages out: by end-point
PSNR W8 alone costs 2 dB more than A8 alone though its SQNR is 8 dB better (docs/decisions/022)."""

_SEARCHED_VALUES = 65536
_COARSE_VALUES, _COARSE_RANGES, _COARSE_ROWS = 8192, 10, 3
"""While candidates are compared: values and clipping ranges searched, and every n-th row; the winner gets all."""


@dataclass(frozen=True, kw_only=True)
class FactorChoice:
    """What was chosen for one quantized tensor.

    Args:
      layers: the layers that read it.
      exponent: a of the winning factor, None for "off".
      shifted: whether 4-bit weights take part of the factor as shifts.
      gain_db: how much lower the layers' relative output error is than without factors.
      spread, spread_after: the largest channel's maximum over the median channel's, before and after the factor.
      reason: why nothing was tried, "" where it was.
    """

    layers: tuple[str, ...]
    exponent: float | None
    shifted: bool
    gain_db: float
    spread: float = 1.0
    spread_after: float = 1.0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A layer that reads the quantized tensor, with its weight and its quantizer."""

    call: LayerCall
    weight: Tensor
    quantizer: WeightQuantizer


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    factor: Tensor
    shift: Tensor | None
    exponent: float


@dataclass(frozen=True, kw_only=True)
class _Errors:
    """Relative output errors of the layers that read a tensor, summed over them.

    Args:
      joint: with input and weight quantized.
      weight: with the weight quantized alone.
    """

    joint: float
    weight: float

    @classmethod
    def of(
        cls, readers: Sequence[Reader], targets: Sequence[Tensor], x: Tensor, rounded: Tensor, weights: Sequence[Tensor]
    ) -> _Errors:
        """Measure both for the input `x`, its rounded form and the quantized weights."""
        return cls(
            joint=_relative_error(readers, targets, rounded, weights),
            weight=_relative_error(readers, targets, x, weights),
        )

    @property
    def score(self) -> float:
        """The joint error with its weight part emphasised."""
        return self.joint + (WEIGHT_EMPHASIS - 1.0) * self.weight


def choose_channel_factors(
    graph_module: fx.GraphModule,
    signature: CallSignature,
    data: CalibrationSet,
    *,
    samples: int = 96,
    seed: int = 0,
    progress: bool | None = False,
) -> tuple[FactorChoice, ...]:
    """Try every candidate on every quantized layer input and keep the best; "off" wins ties.

    Candidates are judged by the relative output error of the layers that read the tensor, with input and weight
    quantized, on `samples` rows evenly over the timesteps. Quantizers must be fitted; winners are fitted anew.

    Left alone: inputs of layers in the carrier type, weights that several calls share, attention operands.
    """
    readers = {str(node.target): readers_of(graph_module, node) for node in input_nodes(graph_module)}
    choices: list[FactorChoice] = []

    def on_weight(target: str, quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
        return weight

    with progress_bar("channel factors", total=len(readers), progress=progress) as bar:

        def on_input(target: str, quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
            if readers.get(target):
                choices.append(_choose(quantizer, readers[target], x))
            bar.update(1)
            return x

        probe = Probe(graph_module, on_weight=on_weight, on_input=on_input)
        device = next((item.weight.device for group in readers.values() for item in group), torch.device("cpu"))
        inputs = flat_inputs(data, spread_rows(data, samples, seed), signature, device)
        modes = {name: module.mode for name, module in graph_module.named_modules() if hasattr(module, "mode")}
        try:
            for name in modes:
                graph_module.get_submodule(name).mode = QuantizerMode.PASS  # type: ignore[assignment]
            with torch.no_grad():
                probe.run(*inputs)
        finally:
            for name, mode in modes.items():
                graph_module.get_submodule(name).mode = mode
    return tuple(choices)


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


def _choose(quantizer: ActivationQuantizer, readers: Sequence[Reader], x: Tensor) -> FactorChoice:
    """Judge all candidates for one tensor and install the winner."""
    axis = quantizer.channel_axis % x.ndim
    targets = [_output(reader.call, x, reader.weight) for reader in readers]
    plain = [reader.quantizer.quantized(reader.weight) for reader in readers]
    rounded_plain = fake_quantize(x, quantizer.scale, quantizer.zero_point, quantizer.spec)
    off = _Errors.of(readers, targets, x, rounded_plain, plain)
    layers = tuple(LAYER.require(reader.call.node).name for reader in readers)
    maxima = quantizer.statistics.channel_maxima
    spread = _spread(maxima)

    def judge(candidate: _Candidate, *, coarse: bool) -> tuple[_Errors, QParams, list[WeightQuantizer]]:
        rows = slice(None, None, _COARSE_ROWS if coarse else 1)
        qparams = _fit_input(quantizer, candidate.factor, x[rows], axis, coarse=coarse)
        rounded = fake_quantize(
            x[rows],
            qparams.scale,
            qparams.zero_point,
            quantizer.spec,
            channel_factor=along_axis(candidate.factor, x.ndim, axis),
        )
        fitted = [_fit_weight(reader, candidate, coarse=coarse) for reader in readers]
        weights = [item.quantized(reader.weight) for item, reader in zip(fitted, readers, strict=True)]
        return _Errors.of(readers, [y[rows] for y in targets], x[rows], rounded, weights), qparams, fitted

    candidate = min(_candidates(quantizer, readers), key=lambda item: judge(item, coarse=True)[0].score)
    errors, qparams, fitted = judge(candidate, coarse=False)
    if errors.score >= off.score or errors.joint > off.joint:
        return FactorChoice(
            layers=layers, exponent=None, shifted=False, gain_db=0.0, spread=spread, spread_after=spread
        )
    quantizer.channel_factor = candidate.factor
    quantizer.set_qparams(qparams)
    for reader, item in zip(readers, fitted, strict=True):
        reader.quantizer.channel_factor, reader.quantizer.channel_shift = item.channel_factor, item.channel_shift
        reader.quantizer.scale, reader.quantizer.zero_point = item.scale, item.zero_point
    gain = 10.0 * float(torch.log10(torch.tensor(off.joint / max(errors.joint, 1e-30))))
    return FactorChoice(
        layers=layers,
        exponent=candidate.exponent,
        shifted=candidate.shift is not None,
        gain_db=gain,
        spread=spread,
        spread_after=_spread(maxima.to(candidate.factor.device) / candidate.factor),
    )


def _spread(maxima: Tensor) -> float:
    """The largest channel's maximum over that of the median channel that is not silent."""
    heard = maxima[maxima > 0]
    return float(heard.max() / heard.median()) if heard.numel() else 1.0


def _candidates(quantizer: ActivationQuantizer, readers: Sequence[Reader]) -> Iterator[_Candidate]:
    maxima = torch.stack([input_channel_maxima(reader) for reader in readers]).amax(dim=0)
    has_w4 = any(reader.quantizer.spec.bits <= 4 for reader in readers)
    for exponent in EXPONENTS:
        factor = smoothing_factor(quantizer.statistics.channel_maxima.to(maxima.device), maxima, exponent)
        yield _Candidate(factor=factor, shift=None, exponent=exponent)
        if has_w4:
            yield _Candidate(factor=factor, shift=channel_shifts(factor), exponent=exponent)


def input_channel_maxima(reader: Reader) -> Tensor:
    """max |W| by input channel, [C_in]; in a grouped convolution the groups' channels follow each other."""
    weight, groups = reader.weight.detach(), reader.call.groups
    by_channel = weight.abs().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return by_channel.amax(dim=(1, 3)).reshape(-1).to(torch.float32)


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


def _fit_weight(reader: Reader, candidate: _Candidate, *, coarse: bool) -> WeightQuantizer:
    """A quantizer like the reader's, fitted under the candidate's factor; coarsely where it is only compared."""
    own = reader.quantizer
    fitted = WeightQuantizer(own.name, own.spec, observer=own.observer_name, groups=own.groups, seed=own.seed)
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


def _relative_error(
    readers: Sequence[Reader], targets: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor]
) -> float:
    """Sum over the layers of the mean over rows of ||y' - y||^2 / ||y||^2: every noise level counts alike."""
    total = 0.0
    for reader, target, weight in zip(readers, targets, weights, strict=True):
        error = _row_energies(_output(reader.call, x, weight) - target)
        total += float((error / _row_energies(target).clamp(min=1e-30)).mean())
    return total


def _row_energies(values: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.float64)
    return norms.square()


def _output(call: LayerCall, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's output without its bias."""
    operator: Any = call.node.target
    result: Tensor = operator(x, weight, None, *call.node.args[3:], **_without_bias(call.node.kwargs))
    return result


def _without_bias(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "bias"}


def input_nodes(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """The calls of activation quantizers, in execution order."""
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), ActivationQuantizer):
            yield node


def readers_of(graph_module: fx.GraphModule, node: fx.Node) -> tuple[Reader, ...]:
    """The layers behind an input quantizer; none if one of them cannot take a factor."""
    readers = []
    for user in node.users:
        call = layer_call(user)
        if call is None or call.weight.op != "call_module" or len(call.weight.users) != 1:
            return ()
        quantizer = graph_module.get_submodule(str(call.weight.target))
        source = call.weight.args[0]
        if not isinstance(quantizer, WeightQuantizer) or not isinstance(source, fx.Node):
            return ()
        readers.append(Reader(call=call, weight=get_tensor(graph_module, source.target), quantizer=quantizer))
    return tuple(readers)
