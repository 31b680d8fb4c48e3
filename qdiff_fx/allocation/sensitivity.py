"""The output error that quantizing each layer, attention or block alone causes: exact, one forward pass each."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from qdiff_fx.allocation.estimate import ErrorEstimate
from qdiff_fx.allocation.kept_figures import KeptFigures
from qdiff_fx.allocation.probe import flat_inputs, spread_rows
from qdiff_fx.allocation.units import InputUnit, WeightUnit, input_units, weight_units
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.errors import QDiffWarning
from qdiff_fx.fake_quantize import (
    ActivationQuantizer,
    AttentionQuantizer,
    BiasCorrection,
    QuantizerMode,
    WeightQuantizer,
    preserved_modes,
    set_mode,
)
from qdiff_fx.graph.meta import BLOCK
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.passes.analysis import blocks

PROGRESS_FILE = "sensitivity.json"
_SAVED_EVERY = 10

Kind = Literal["weight", "input", "attention", "block"]

LEAST_CORRELATION, LEAST_UNITS = 0.8, 10
"""Rank correlation under which the estimate is called misleading, and the rows of a kind that tell it from chance."""


@dataclass(frozen=True, kw_only=True)
class SensitivityRow:
    """What one quantizer, or all of a block, does to the output alone.

    Args:
      kind: "weight" and "input" of a layer, "attention" (its operands and probabilities) or "block" (all in it).
      name: of the layer, attention or block.
      bits: width of the weight or input; None for attentions and blocks.
      error: mean over rows of ||y' - y||^2 / ||y||^2, y the full-precision output.
      estimate: the same as the cheap estimate predicts it; None where there is none.
    """

    kind: Kind
    name: str
    bits: int | None
    error: float
    estimate: float | None = None

    @property
    def sqnr_db(self) -> float:
        """-10 log10 of the error; inf where the output did not change."""
        return -10.0 * math.log10(self.error) if self.error > 0.0 else math.inf


@dataclass(frozen=True, kw_only=True)
class SensitivityReport:
    """Everything that was measured, worst first.

    Args:
      rows: sorted by error, largest first.
      samples: rows of the calibration set that it was measured on.
      rank_correlation: Spearman's rho between error and estimate, by kind ("weight", "input").
    """

    rows: tuple[SensitivityRow, ...]
    samples: int
    rank_correlation: dict[str, float]

    def worst(self, kind: Kind | None = None, count: int = 10) -> tuple[SensitivityRow, ...]:
        """The first `count` rows of one kind."""
        return tuple(row for row in self.rows if kind is None or row.kind == kind)[:count]

    def misleading(self) -> dict[str, float]:
        """The rank correlations that are too low for what allocation does by the estimate, by kind."""
        counts: Counter[str] = Counter(row.kind for row in self.rows if row.estimate is not None)
        return {
            kind: value
            for kind, value in self.rank_correlation.items()
            if value < LEAST_CORRELATION and counts[kind] >= LEAST_UNITS
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'alone':<10} {'dB':>7}  {'bits':>4}  name"]
        lines += [
            f"{row.kind:<10} {row.sqnr_db:7.1f}  {'' if row.bits is None else row.bits:>4}  {row.name}"
            for row in self.rows
        ]
        known = ", ".join(f"{kind}s {value:.2f}" for kind, value in self.rank_correlation.items())
        return "\n".join([*lines, *([f"rank correlation of allocation's estimate: {known}"] if known else [])])


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """Quantizers that are switched on together."""

    kind: Kind
    name: str
    modules: tuple[nn.Module, ...]
    bits: int | None = None
    estimate: float | None = None

    @property
    def key(self) -> str:
        return f"{self.kind} {self.name}"


def measure_sensitivity(
    graph_module: fx.GraphModule,
    signature: CallSignature,
    data: CalibrationSet,
    *,
    estimate: ErrorEstimate | None = None,
    samples: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    identity: str = "",
    checkpoint_dir: Path | None = None,
    progress: bool | None = False,
) -> SensitivityReport:
    """Quantize every unit alone and compare the output with full precision; quantizers must be fitted.

    Args:
      estimate: predictions to show beside the measurement.
      samples: rows, evenly over the timesteps.
      identity: digest of model, config and data; a checkpoint of another is refused.
      checkpoint_dir: where finished figures are kept, so that a killed run continues.

    Raises: CheckpointError if `checkpoint_dir` holds another run's figures.
    """
    subjects = _subjects(graph_module, estimate)
    device = next((unit.weight.device for unit in weight_units(graph_module)), torch.device("cpu"))
    rows = spread_rows(data, samples, seed)
    batches = [flat_inputs(data, part, signature, device) for part in torch.split(rows, batch_size)]
    file = None if checkpoint_dir is None else checkpoint_dir / PROGRESS_FILE
    errors = KeptFigures(file, identity, save_every=_SAVED_EVERY)
    with (
        errors.saved(),
        preserved_modes(graph_module),
        torch.no_grad(),
        progress_bar("sensitivity", total=len(subjects), progress=progress) as bar,
    ):
        set_mode(graph_module, QuantizerMode.PASS)
        references = [_first(graph_module(*batch)) for batch in batches]
        for subject in subjects:
            if subject.key not in errors:
                _switch(subject.modules, QuantizerMode.QUANTIZE)
                outputs = [_first(graph_module(*batch)) for batch in batches]
                _switch(subject.modules, QuantizerMode.PASS)
                errors[subject.key] = _error(references, outputs)
            bar.update(1)
    measured = [
        SensitivityRow(
            kind=subject.kind,
            name=subject.name,
            bits=subject.bits,
            error=errors[subject.key],
            estimate=subject.estimate,
        )
        for subject in subjects
    ]
    return SensitivityReport(
        rows=tuple(sorted(measured, key=lambda row: -row.error)),
        samples=len(rows),
        rank_correlation=_correlations(measured),
    )


def warn_of_estimate(report: SensitivityReport, *, stacklevel: int) -> None:
    """Warn in one line where the estimate that allocation goes by ranks otherwise than the measurement."""
    found = ", ".join(f"{kind}s {value:.2f}" for kind, value in report.misleading().items())
    if found:
        warnings.warn(
            f"calibrate() may raise other layers than the worst: rank correlation of its estimate with these figures "
            f"is {found} (want {LEAST_CORRELATION:g}); give the worst rows more bits by LayerRule, or set target_sqnr",
            QDiffWarning,
            stacklevel=stacklevel,
        )


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; ties keep their order. nan for fewer than two values."""
    if len(first) < 2:
        return float("nan")
    ranks = torch.stack([torch.tensor(values, dtype=torch.float64).argsort().argsort() for values in (first, second)])
    return float(torch.corrcoef(ranks.to(torch.float64))[0, 1])


def _correlations(rows: Sequence[SensitivityRow]) -> dict[str, float]:
    result = {}
    for kind in ("weight", "input"):
        known = [(row.error, row.estimate) for row in rows if row.kind == kind and row.estimate is not None]
        if len(known) > 1:
            result[kind] = spearman([error for error, _ in known], [estimate for _, estimate in known])
    return result


def _subjects(graph_module: fx.GraphModule, estimate: ErrorEstimate | None) -> tuple[_Subject, ...]:
    units: tuple[WeightUnit | InputUnit, ...] = (*weight_units(graph_module), *input_units(graph_module))
    layers = [
        _Subject(
            kind="weight" if isinstance(unit, WeightUnit) else "input",
            name=unit.name,
            modules=(unit.quantizer, *(unit.corrections if isinstance(unit, WeightUnit) else ())),
            bits=unit.quantizer.spec.bits,
            estimate=None if estimate is None else _predicted(estimate, unit),
        )
        for unit in units
    ]
    attentions: list[_Subject] = []
    members: dict[int, list[nn.Module]] = {}
    names = {block.index: block.name for block in blocks(graph_module)}
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, AttentionQuantizer):
            predicted = None if estimate is None else estimate.attentions.get(str(node.target))
            attentions.append(_Subject(kind="attention", name=module.name, modules=(module,), estimate=predicted))
        if isinstance(module, (AttentionQuantizer, ActivationQuantizer, WeightQuantizer, BiasCorrection)):
            index = next((BLOCK.get(item) for item in (node, *node.users) if BLOCK.get(item) is not None), None)
            if index is not None:
                members.setdefault(index, []).append(module)
    return (
        *layers,
        *attentions,
        *(
            _Subject(kind="block", name=f"{index} {names[index]}", modules=tuple(modules))
            for index, modules in sorted(members.items())
        ),
    )


def _predicted(estimate: ErrorEstimate, unit: WeightUnit | InputUnit) -> float | None:
    if isinstance(unit, WeightUnit):
        return estimate.weights[unit.target][unit.quantizer.spec.bits]
    return estimate.inputs.get(unit.target)


def _switch(modules: Sequence[nn.Module], mode: QuantizerMode) -> None:
    for module in modules:
        set_mode(module, mode)


def _error(references: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Mean over rows of the relative energy of the error."""
    ratios = [
        (output.double() - reference.double()).flatten(1).square().sum(dim=1)
        / reference.double().flatten(1).square().sum(dim=1).clamp(min=1e-30)
        for reference, output in zip(references, outputs, strict=True)
    ]
    return float(torch.cat(ratios).mean())


def _first(output: Any) -> Tensor:
    result: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return result
