"""Predict the output error of every quantizer from one forward and one backward pass over a few samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from qdiff_fx.allocation.probe import Probe, flat_inputs, spread_rows
from qdiff_fx.allocation.units import WeightUnit, weight_units
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.fake_quantize import ActivationQuantizer, QuantizerMode, WeightQuantizer, preserved_modes, set_mode
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.numerics.spec import weight_spec


@dataclass(frozen=True, kw_only=True)
class ErrorEstimate:
    """Predicted energy of the output error that a quantizer alone causes, relative to the output's energy.

    Args:
      weights: by quantizer target, at each candidate width.
      inputs: by quantizer target, at its own width.
      without_factor: by quantizer target of weights that have a channel factor, at their own width: what giving it up
        would make of the weight's error.
    """

    weights: Mapping[str, Mapping[int, float]]
    inputs: Mapping[str, float]
    without_factor: Mapping[str, float] = field(default_factory=dict)


def estimate_errors(
    graph_module: fx.GraphModule,
    signature: CallSignature,
    data: CalibrationSet,
    *,
    weight_bits: tuple[int, ...] = (8,),
    samples: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool | None = False,
) -> ErrorEstimate:
    """First-order output error of every quantizer alone: E ||J d||^2 / ||output||^2, d its local error, J the Jacobian.

    With a random cotangent v ~ N(0, I) on the output, <J^T v, d>^2 has the expectation ||J d||^2 (Hutchinson, 1990).
    v is independent from row to row, so one inner product for a batch's weight gradient sums the rows' energies.

    Args:
      weight_bits: widths to predict beside each weight's own.
      samples: rows, evenly over the timesteps.
      batch_size: rows a backward pass; each gives one draw for every weight.
    """
    units = weight_units(graph_module)
    deltas = {unit.target: _weight_errors(unit, weight_bits) for unit in units}
    weights = {unit.target: dict.fromkeys(deltas[unit.target], 0.0) for unit in units}
    factored = [unit for unit in units if unit.quantizer.channel_factor is not None]
    plain_deltas = {unit.target: error_at(unit, unit.quantizer.spec.bits, keep_factor=False) for unit in factored}
    without_factor = dict.fromkeys(plain_deltas, 0.0)
    inputs: dict[str, float] = {}
    leaves: dict[str, Tensor] = {}

    def on_weight(target: str, quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
        leaves[target] = weight.detach().clone().requires_grad_(True)
        return leaves[target]

    def on_input(target: str, quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
        inputs.setdefault(target, 0.0)
        y = x.clone() if x.requires_grad else x.detach().requires_grad_(True)
        value = y.detach()  # a hook that held y itself would keep the whole autograd graph alive

        def accumulate(gradient: Tensor) -> None:
            with torch.no_grad():
                error = quantizer(value) - value
                rows = (gradient.double() * error.double()).reshape(error.shape[0], -1).sum(dim=1)
                inputs[target] += float(rows.square().sum())

        y.register_hook(accumulate)  # type: ignore[no-untyped-call]
        return y

    probe = Probe(graph_module, on_weight=on_weight, on_input=on_input)
    generator = torch.Generator().manual_seed(seed)
    rows = spread_rows(data, samples, seed)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    device = units[0].weight.device if units else torch.device("cpu")
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
                for target, leaf in leaves.items():
                    gradient = leaf.grad
                    if gradient is not None:
                        for bits, delta in deltas[target].items():
                            weights[target][bits] += float((gradient.double() * delta).sum()) ** 2
                        if target in plain_deltas:
                            without_factor[target] += float((gradient.double() * plain_deltas[target]).sum()) ** 2
                leaves.clear()
                bar.update(1)
    count = max(1, len(rows))
    return ErrorEstimate(
        weights={target: {bits: value / count for bits, value in by.items()} for target, by in weights.items()},
        inputs={target: value / count for target, value in inputs.items()},
        without_factor={target: value / count for target, value in without_factor.items()},
    )


def _weight_errors(unit: WeightUnit, widths: tuple[int, ...]) -> dict[int, Tensor]:
    """What rounding the weight changes, at its own width and at `widths`."""
    own = unit.quantizer.spec.bits
    return {bits: error_at(unit, bits) for bits in dict.fromkeys((own, *widths))}


@torch.no_grad()
def error_at(unit: WeightUnit, bits: int, *, keep_factor: bool = True) -> Tensor:
    """fake_quantize(W) - W at this width, in float64; the unit's own quantizer is not changed."""
    quantizer = unit.quantizer
    if bits != quantizer.spec.bits or not keep_factor:
        quantizer = quantizer.unfitted(weight_spec(bits))
        quantizer.channel_factor = unit.quantizer.channel_factor if keep_factor else None
        quantizer.fit(unit.weight)
    weight = unit.weight.detach()
    return quantizer.quantized(weight).double() - weight.double()
