"""Predict the output error of every quantizer from one forward and one backward pass over a few samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.allocation.factor_errors import output_axes
from qdiff_fx.allocation.input_means import centred
from qdiff_fx.allocation.probe import Probe, flat_inputs, spread_rows
from qdiff_fx.allocation.units import WeightUnit, weight_units
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.fake_quantize import (
    ActivationQuantizer,
    AttentionQuantizer,
    QuantizerMode,
    WeightQuantizer,
    preserved_modes,
    set_mode,
)
from qdiff_fx.graph.edit import LayerCall, layer_call
from qdiff_fx.graph.memory import row_memory, rows_within
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.numerics.spec import weight_spec


@dataclass(frozen=True, kw_only=True)
class ErrorEstimate:
    """Predicted energy of the output error that a quantizer alone causes, relative to the output's energy.

    Args:
      weights: by quantizer target, at each candidate width.
      inputs: by quantizer target, at its own width.
      attentions: by quantizer target: of operands and probabilities together.
      without_factor: by quantizer target of weights that have a channel factor, at their own width: what giving it up
        would make of the weight's error.
    """

    weights: Mapping[str, Mapping[int, float]]
    inputs: Mapping[str, float]
    attentions: Mapping[str, float] = field(default_factory=dict)
    without_factor: Mapping[str, float] = field(default_factory=dict)


def estimate_errors(
    graph_module: fx.GraphModule,
    signature: CallSignature,
    data: CalibrationSet,
    *,
    means: Mapping[str, Tensor] | None = None,
    weight_bits: tuple[int, ...] = (8,),
    samples: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool | None = False,
) -> ErrorEstimate:
    """First-order output error of every quantizer alone: E ||J d||^2 / ||output||^2, d its local error, J the Jacobian.

    With a random cotangent v ~ N(0, I) on the output, <J^T v, d>^2 has the expectation ||J d||^2 (Hutchinson, 1990).
    v is independent from row to row, so one inner product for a batch's weight gradient sums the rows' energies.
    Of an attention d is what quantizing its operands and probabilities does to its own output, taken exactly.

    Args:
      means: of the layers' inputs (`input_means`) where biases will make up for the mean of a weight's error: only what
        varies is counted then, but of learned rounding.
      weight_bits: widths to predict beside each weight's own.
      samples: rows, evenly over the timesteps.
      batch_size: rows a backward pass, fewer where so many would not fit; each pass gives one draw for every weight.
    """
    units = weight_units(graph_module)
    candidates = {unit.target: _candidates(unit, weight_bits) for unit in units}
    weights = {unit.target: dict.fromkeys(candidates[unit.target].at, 0.0) for unit in units}
    without_factor = {target: 0.0 for target, item in candidates.items() if item.plain is not None}
    inputs: dict[str, float] = {}
    attentions: dict[str, float] = {}
    products: dict[tuple[str, int | None], float] = {}
    centring = _Centring(graph_module, means or {})

    def on_weight(target: str, quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
        leaf = weight.detach().requires_grad_(True)
        value = weight.detach()

        def take(accumulated: Tensor) -> None:
            # Layer by layer: neither the gradients nor the errors of all weights fit into memory beside a large model.
            gradient, accumulated.grad = accumulated.grad, None
            assert gradient is not None
            with torch.no_grad():
                whole = gradient.double()
                varying = centring.centred(target, whole)
                for key, item in candidates[target].quantizers():
                    through = varying if item.round_up is None else whole  # biases of learned rounding stay
                    product = float((through * (item.quantized(value).double() - value.double())).sum())
                    products[target, key] = products.get((target, key), 0.0) + product

        leaf.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
        return leaf

    def on_input(target: str, quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
        inputs.setdefault(target, 0.0)
        y = x.clone() if x.requires_grad else x.detach().requires_grad_(True)
        value = y.detach()  # a hook that held y itself would keep the whole autograd graph alive

        def accumulate(gradient: Tensor) -> None:
            with torch.no_grad():
                inputs[target] += _row_energies(gradient, quantizer(value) - value)

        y.register_hook(accumulate)  # type: ignore[no-untyped-call]
        return y

    def on_attention(target: str, quantizer: AttentionQuantizer, args: Any, kwargs: Any) -> Tensor:
        attentions.setdefault(target, 0.0)
        set_mode(quantizer, QuantizerMode.QUANTIZE)
        with torch.no_grad():
            quantized = quantizer(*args, **kwargs)
        set_mode(quantizer, QuantizerMode.PASS)
        y: Tensor = quantizer(*args, **kwargs)
        y = y if y.requires_grad else y.requires_grad_(True)
        error = quantized - y.detach()

        def accumulate(gradient: Tensor) -> None:
            attentions[target] += _row_energies(gradient, error)

        y.register_hook(accumulate)  # type: ignore[no-untyped-call]
        return y

    probe = _CentringProbe(graph_module, centring, on_weight=on_weight, on_input=on_input, on_attention=on_attention)
    generator = torch.Generator().manual_seed(seed)
    rows = spread_rows(data, samples, seed)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    device = units[0].weight.device if units else torch.device("cpu")
    memory = row_memory(graph_module, flat_inputs(data, rows[:1], signature, device))
    batch_size = rows_within(memory.saved + memory.forward, batch_size)
    with preserved_modes(graph_module):
        set_mode(graph_module, QuantizerMode.PASS)
        for module in graph_module.modules():
            if isinstance(module, ActivationQuantizer):
                module.mode = QuantizerMode.QUANTIZE  # called by the probe only
        with progress_bar("sensitivity", total=-(-len(rows) // batch_size), progress=progress) as bar:
            for start in range(0, len(rows), batch_size):
                batch = flat_inputs(data, rows[start : start + batch_size], signature, device)
                with torch.enable_grad():
                    output = probe.run(*batch)[0]
                    energy = output.detach().double().reshape(output.shape[0], -1).square().sum(dim=1)
                    cotangent = torch.randn(output.shape, generator=generator).to(output)
                    cotangent /= energy.sqrt().to(output).reshape(-1, *[1] * (output.ndim - 1))
                    output.backward(cotangent)
                for (target, bits), product in products.items():
                    if bits is None:
                        without_factor[target] += product**2
                    else:
                        weights[target][bits] += product**2
                products.clear()
                bar.update(1)
    count = max(1, len(rows))
    return ErrorEstimate(
        weights={target: {bits: value / count for bits, value in by.items()} for target, by in weights.items()},
        inputs={target: value / count for target, value in inputs.items()},
        attentions={target: value / count for target, value in attentions.items()},
        without_factor={target: value / count for target, value in without_factor.items()},
    )


def _row_energies(gradient: Tensor, error: Tensor) -> float:
    """Sum over rows of <gradient, error>^2."""
    rows = (gradient.double() * error.double()).reshape(error.shape[0], -1).sum(dim=1)
    return float(rows.square().sum())


class _Centring:
    """Takes what goes through the layers' mean outputs out of weight gradients.

    Not the probe's own business: hooks that held the probe would keep every activation alive.
    """

    def __init__(self, graph_module: fx.GraphModule, means: Mapping[str, Tensor]) -> None:
        self.means = means
        self.output_gradients: dict[str, Tensor] = {}
        self.readers = {
            str(node.target): [user.name for user in node.users if user.name in means]
            for node in graph_module.graph.find_nodes(op="call_module")
        }

    def watch(self, call: LayerCall, output: Tensor) -> None:
        """Keep the gradient of this output's channels when it comes."""
        name, axes = call.node.name, output_axes(call, output)

        def keep(gradient: Tensor) -> None:
            self.output_gradients[name] = gradient.sum(dim=axes)

        output.register_hook(keep)  # type: ignore[no-untyped-call]

    def centred(self, target: str, gradient: Tensor) -> Tensor:
        """`gradient` of the weight behind this quantizer without what goes through its readers' means."""
        for name in self.readers.get(target, ()):
            gradient = centred(gradient, self.output_gradients.pop(name), self.means[name])
        return gradient


class _CentringProbe(Probe):
    """A probe whose layers' outputs are watched."""

    def __init__(self, graph_module: fx.GraphModule, centring: _Centring, **callbacks: Any) -> None:
        super().__init__(graph_module, **callbacks)
        self.centring = centring

    def run_node(self, n: fx.Node) -> Any:
        """Run it; the outputs of layers with known input means are watched."""
        output, call = super().run_node(n), layer_call(n) if n.name in self.centring.means else None
        if call is not None:
            self.centring.watch(call, output)
        return output


@dataclass(frozen=True, kw_only=True)
class _Candidates:
    """Fitted quantizers of one weight: at every width that is asked about, and at its own without channel factor."""

    at: Mapping[int, WeightQuantizer]
    plain: WeightQuantizer | None

    def quantizers(self) -> list[tuple[int | None, WeightQuantizer]]:
        return [*self.at.items(), *([] if self.plain is None else [(None, self.plain)])]


def _candidates(unit: WeightUnit, widths: tuple[int, ...]) -> _Candidates:
    own = unit.quantizer.spec.bits
    return _Candidates(
        at={bits: _fitted(unit, bits) for bits in dict.fromkeys((own, *widths))},
        plain=None if unit.quantizer.channel_factor is None else _fitted(unit, own, keep_factor=False),
    )


def _fitted(unit: WeightUnit, bits: int, *, keep_factor: bool = True) -> WeightQuantizer:
    """A quantizer of the weight at this width; the unit's own, unchanged, where it is that."""
    if bits == unit.quantizer.spec.bits and keep_factor:
        return unit.quantizer
    quantizer = unit.quantizer.unfitted(weight_spec(bits))
    quantizer.channel_factor = unit.quantizer.channel_factor if keep_factor else None
    quantizer.fit(unit.weight)
    return quantizer


@torch.no_grad()
def error_at(unit: WeightUnit, bits: int, *, keep_factor: bool = True) -> Tensor:
    """fake_quantize(W) - W at this width, in float64; the unit's own quantizer is not changed."""
    weight = unit.weight.detach()
    return _fitted(unit, bits, keep_factor=keep_factor).quantized(weight).double() - weight.double()
