"""The stages of calibrate(): observation, channel factors, bit allocation, learning, quality target, quality guard."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, fx

from qdiff_fx.allocation.allocate import allocate
from qdiff_fx.allocation.attention_factors import fold_attention_factors
from qdiff_fx.allocation.attention_rows import ruined_probabilities
from qdiff_fx.allocation.bias_correction import bias_corrections
from qdiff_fx.allocation.channel_factors import FactorChoice, choose_channel_factors
from qdiff_fx.allocation.estimate import ErrorEstimate, estimate_errors
from qdiff_fx.allocation.input_means import input_means
from qdiff_fx.allocation.kept_figures import KeptFigures
from qdiff_fx.allocation.target import MAXIMUM_EVALUATIONS, ranked_raises, reach_target
from qdiff_fx.allocation.units import input_units, weight_units
from qdiff_fx.calibration import CalibrationBatch, CalibrationSet
from qdiff_fx.calibration.driver import fit_activations, fit_weights, observe, reset
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.errors import QDiffWarning
from qdiff_fx.evaluation.quality import SqnrResult, output_sqnr
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.graph.edit import shared_copy
from qdiff_fx.graph.memory import row_memory, rows_within
from qdiff_fx.identity import config_digest, digest, model_digest, run_identity, tensors_digest
from qdiff_fx.model import PreparedUNet
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.prepare.correct_biases import CorrectBiases
from qdiff_fx.passes.prepare.raises import ApplyRaises, Raise
from qdiff_fx.reconstruction import BlockResult, ReconstructionConfig, reconstruct

logger = logging.getLogger(__name__)

HOLDOUT_SHARE = 0.1
GUARD_DB = 10.0
"""Output SQNR below which a result is called doubtful."""

TARGET_FILE = "target.json"
"""What calibrate() keeps of its quality target in the checkpoint folder."""

SELECTION_ROWS = 128
"""Rows that a quality target is held against while layers are raised: with 16, the median of a network that just
reached 25 dB was 24.6 dB on other rows."""

_EVALUATION_BATCH = 32

Means: TypeAlias = Mapping[str, Tensor]
"""Of layers' inputs, by node."""


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What was decided beyond the config, with reasons.

    Args:
      factors: one entry a quantized tensor that was tried.
      raises: quantizers that were raised.
      estimate: predicted error of every quantizer, None where nothing was to be decided.
    """

    factors: tuple[FactorChoice, ...] = ()
    raises: tuple[Raise, ...] = ()
    estimate: ErrorEstimate | None = None


@contextmanager
def fitting_anew(prepared: PreparedUNet) -> Iterator[None]:
    """Every quantizer starts from nothing, and ends there too if the block fails: half a fit cannot be converted."""
    _forget(prepared)
    prepared.calibrated, prepared.calibration = False, {}
    try:
        yield
    except BaseException:
        _forget(prepared)
        prepared.set_mode(QuantizerMode.OBSERVE)
        raise
    prepared.calibrated = True


def _forget(prepared: PreparedUNet) -> None:
    reset(prepared.graph_module)
    _correct(prepared, {})


def hold_out(data: CalibrationSet, holdout: CalibrationSet | None, seed: int) -> tuple[CalibrationSet, CalibrationSet]:
    """(fit, held): a seeded tenth of the rows, evenly over the timesteps, is used for no fit.

    A set with fewer than ten rows a timestep is too small for that: both are all of it, and the log says so.
    """
    if holdout is not None:
        return data, holdout
    if len(data) * HOLDOUT_SHARE < max(1, len(data.timesteps)):
        logger.warning(
            "%d calibration samples are too few to set a tenth aside: quality is measured on what was fitted", len(data)
        )
        return data, data
    return data.split(HOLDOUT_SHARE, seed=seed)


def selection_rows(data: CalibrationSet, seed: int) -> CalibrationSet:
    """At most `SELECTION_ROWS` seeded rows of the fitted ones, evenly over the timesteps, to select raises by."""
    return data if len(data) <= SELECTION_ROWS else data.split(SELECTION_ROWS / len(data), seed=seed)[1]


def equalize_attentions(
    prepared: PreparedUNet, data: CalibrationSet, *, progress: bool | None = False
) -> tuple[FactorChoice, ...]:
    """Fold channel factors of attention operands into their projections, before anything is observed."""
    if not prepared.qdiff_config.equalize:
        return ()
    return fold_attention_factors(
        prepared.graph_module, prepared.signature, data, seed=prepared.qdiff_config.seed, progress=progress
    )


def observe_and_fit(
    prepared: PreparedUNet, data: CalibrationSet, batch_size: int, checkpoint_dir: Path | None, progress: bool | None
) -> None:
    """Run `data` through the full-precision network and fix every grid; a killed observation continues."""
    prepared.set_mode(QuantizerMode.OBSERVE)
    observe(
        prepared,
        prepared.graph_module,
        data,
        batch_size=_rows_at_a_time(prepared, data, batch_size),
        seed=prepared.qdiff_config.seed,
        identity="" if checkpoint_dir is None else run_identity(prepared, data, batch_size),
        checkpoint_dir=checkpoint_dir,
        progress=progress,
    )
    fit_activations(prepared.graph_module)
    fit_weights(prepared.graph_module, progress=progress)


def decide(prepared: PreparedUNet, data: CalibrationSet, means: Means, *, progress: bool | None) -> Decisions:
    """Fold channel factors and allocate bits as the config asks; quantizers must be fitted.

    Probabilities that their grid ruins are kept in the carrier type whatever the config asks.
    """
    config, graph_module, signature = prepared.qdiff_config, prepared.graph_module, prepared.signature
    kept = ruined_probabilities(graph_module, signature, data, seed=config.seed)
    if kept:
        names = ", ".join(name for item in kept for name in item.layers)
        logger.warning("softmax stays in the carrier type, %d bits would ruin it: %s", config.softmax_bits, names)
        _apply(prepared, graph_module, kept)
    factors = _choose_factors(prepared, data, None, progress)
    spends = config.weight_slack > 0 or config.target_bytes is not None
    raisable = spends and bool(weight_units(graph_module))
    if not raisable and not (config.activation_slack > 0 and input_units(graph_module)):
        return Decisions(factors=factors, raises=kept)
    estimate = estimate_errors(graph_module, signature, data, means=means, seed=config.seed, progress=progress)
    raises = allocate(
        graph_module,
        estimate,
        weight_slack=_weight_slack(prepared),
        activation_slack=config.activation_slack,
    )
    _apply(prepared, graph_module, raises)
    widened = {layer for item in raises if item.kind == "weight" and item.bits for layer in item.layers}
    anew = _choose_factors(prepared, data, widened, progress)  # what does not pay at 4 bits may pay at 8
    judged = {layer for choice in anew for layer in choice.layers}
    factors = (*(choice for choice in factors if judged.isdisjoint(choice.layers)), *anew)
    return Decisions(factors=factors, raises=(*kept, *raises), estimate=estimate)


def _choose_factors(
    prepared: PreparedUNet, data: CalibrationSet, layers: Collection[str] | None, progress: bool | None
) -> tuple[FactorChoice, ...]:
    """Channel factors as the config asks; of the tensors that some of `layers` read, if it is given."""
    config = prepared.qdiff_config
    nothing = layers is not None and not layers
    if not config.equalize or nothing or not input_units(prepared.graph_module):
        return ()
    return choose_channel_factors(
        prepared.graph_module,
        prepared.signature,
        data,
        layers=layers,
        shifts=config.channel_shifts,
        centred=config.bias_correction,
        iterations=config.factor_iterations,
        seed=config.seed,
        progress=progress,
    )


def learn_blocks(
    prepared: PreparedUNet,
    data: CalibrationSet,
    config: ReconstructionConfig,
    batch_size: int,
    folder: Path | None,
    progress: bool | None,
) -> tuple[BlockResult, ...]:
    """Learn weight rounding and activation steps block by block; finished blocks of a killed run are taken over."""

    def calls() -> Iterator[tuple[Tensor, ...]]:
        for batch in data.batches(config.batch_size):
            inputs = prepared.signature.flatten(batch.args, batch.kwargs)
            yield tuple(value.to(prepared.device) for value in inputs)

    return reconstruct(
        prepared.graph_module,
        prepared.signature.names,
        calls,
        len(data),
        config,
        identity={
            "model": model_digest(prepared),
            "quantization config": config_digest(prepared.qdiff_config),
            "calibration set": digest(f"{data.fingerprint} {batch_size}"),
        },
        checkpoint_dir=None if folder is None else folder / "blocks",
        progress=progress,
    )


def layer_input_means(prepared: PreparedUNet, data: CalibrationSet, *, progress: bool | None) -> Means:
    """Means of the inputs of the layers whose biases will be corrected; none if the config does not ask for it."""
    config = prepared.qdiff_config
    if not config.bias_correction:
        return {}
    return input_means(prepared.graph_module, prepared.signature, data, seed=config.seed, progress=progress)


def correct_biases(prepared: PreparedUNet, means: Means) -> int:
    """Correct the biases of layers whose weights are rounded to nearest; returns how many."""
    corrections = bias_corrections(prepared.graph_module, means)
    _correct(prepared, corrections)
    return len(corrections)


def meet_target(
    prepared: PreparedUNet,
    data: CalibrationSet,
    means: Means,
    folder: Path | None,
    progress: bool | None,
) -> tuple[Raise, ...]:
    """Raise quantizers until the median SQNR over timesteps on `selection_rows` reaches `config.target_sqnr`.

    Less its standard error: the median of other samples is to reach the target too.
    With a folder the measured figures are kept there: they hold for every target, so a killed run or another target
    measures only what is new.

    Raises: CalibrationError with the best figure if the target is out of reach.
    """
    config = prepared.qdiff_config
    assert config.target_sqnr is not None
    selection = selection_rows(data, config.seed + 1)
    estimate = estimate_errors(
        prepared.graph_module, prepared.signature, data, means=means, seed=config.seed, progress=progress
    )
    ranked = ranked_raises(prepared.graph_module, estimate)
    original = prepared.graph_module
    identity = "" if folder is None else _target_identity(prepared, selection, ranked)
    figures = KeptFigures(None if folder is None else folder / TARGET_FILE, identity)

    bar = progress_bar("target", total=MAXIMUM_EVALUATIONS, progress=progress)

    def measure(raises: Sequence[Raise]) -> float:
        key = str(len(raises))
        if key not in figures:
            prepared.graph_module = shared_copy(original)
            _apply(prepared, prepared.graph_module, tuple(raises))
            correct_biases(prepared, means)
            try:
                quality = measure_quality(prepared, selection)
                figures[key] = quality.median_db - quality.median_error_db()
            finally:
                prepared.graph_module = original
        bar.update(1)
        return figures[key]

    with bar:
        result = reach_target(ranked, measure, config.target_sqnr)
    _apply(prepared, original, result.raises)
    correct_biases(prepared, means)
    logger.info("target_sqnr reached with %d raises after %d evaluations", len(result.raises), result.evaluations)
    return result.raises


def _target_identity(prepared: PreparedUNet, selection: CalibrationSet, ranked: Sequence[Raise]) -> str:
    """SHA-256 over what the figures of a target depend on: weights, grids, learned rounding, samples and the order."""
    order = digest(" ".join(f"{item.kind} {item.target} {item.bits}" for item in ranked))
    config = config_digest(prepared.qdiff_config)
    grids = tensors_digest(prepared.graph_module.code, prepared.graph_module.state_dict().items())
    return digest(f"less its error {config} {selection.fingerprint} {order} {grids}")


def measure_quality(prepared: PreparedUNet, held: CalibrationSet, *, progress: bool | None = False) -> SqnrResult:
    """Output SQNR of the simulated quantized network against full precision.

    Raises: NonFiniteError if an output is not finite.
    """

    def in_mode(mode: QuantizerMode) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            prepared.set_mode(mode)
            return prepared(*args, **kwargs)

        return call

    with progress_bar("quality", total=len(held), progress=progress) as bar:
        batches = _counted(held.batches(_rows_at_a_time(prepared, held, _EVALUATION_BATCH)), bar)
        result = output_sqnr(in_mode(QuantizerMode.PASS), in_mode(QuantizerMode.QUANTIZE), batches)
    prepared.set_mode(QuantizerMode.QUANTIZE)
    return result


def _rows_at_a_time(prepared: PreparedUNet, data: CalibrationSet, wanted: int) -> int:
    """`wanted`, or fewer rows where a forward pass of so many would not fit into memory."""
    args, kwargs = data.gather([0])
    memory = row_memory(prepared.graph_module, prepared.signature.flatten(args, kwargs))
    return rows_within(memory.forward, wanted)


def _counted(batches: Iterable[CalibrationBatch], bar: Any) -> Iterator[CalibrationBatch]:
    for batch in batches:
        yield batch
        bar.update(batch.size)


def guard(quality: SqnrResult, decisions: Decisions, prepared: PreparedUNet) -> bool:
    """Warn in one line if the result is doubtful; returns whether it is good enough."""
    if min(quality.pooled_db, quality.median_db) >= GUARD_DB:
        return True
    worst = min(quality.by_timestep, key=lambda timestep: quality.by_timestep[timestep])
    layers = (
        ", ".join(worst_layers(prepared.graph_module, decisions.estimate)) or "unknown (no sensitivity was measured)"
    )
    warnings.warn(
        f"the quantized output keeps only {quality.pooled_db:.1f} dB of SQNR pooled, {quality.median_db:.1f} dB in the "
        f"median over timesteps (want {GUARD_DB:g}); worst timestep {worst:g}; worst layers: {layers}; "
        f"set QDiffConfig(target_sqnr=20.0), or more weight_slack or activation_slack",
        QDiffWarning,
        stacklevel=4,  # the caller of calibrate()
    )
    return False


def worst_layers(graph_module: fx.GraphModule, estimate: ErrorEstimate | None, count: int = 3) -> tuple[str, ...]:
    """Names of the layers whose quantizers are predicted to cause most of the remaining error."""
    errors = layer_errors(graph_module, estimate)
    return tuple(sorted(errors, key=lambda name: -errors[name])[:count])


def error_rows(prepared: PreparedUNet, decisions: Decisions) -> tuple[dict[str, Any], ...]:
    """`layer_errors` as a CalibrationReport holds them."""
    errors = layer_errors(prepared.graph_module, decisions.estimate)
    return tuple({"name": name, "error": error} for name, error in errors.items())


def layer_errors(graph_module: fx.GraphModule, estimate: ErrorEstimate | None) -> dict[str, float]:
    """Predicted relative error that each layer's quantizers cause alone, at their present widths, in network order."""
    errors: dict[str, float] = {}
    if estimate is None:
        return errors
    for weight in weight_units(graph_module):
        by_bits = estimate.weights.get(weight.target, {})
        errors[weight.name] = errors.get(weight.name, 0.0) + by_bits.get(weight.quantizer.spec.bits, 0.0)
    for unit in input_units(graph_module):
        errors[unit.name] = errors.get(unit.name, 0.0) + estimate.inputs.get(unit.target, 0.0)
    return errors


def _weight_slack(prepared: PreparedUNet) -> float:
    """The config's slack, or what `target_bytes` leaves over the present bytes."""
    config = prepared.qdiff_config
    if config.target_bytes is None:
        return config.weight_slack
    present = sum(unit.bytes for unit in weight_units(prepared.graph_module))
    return max(0.0, config.target_bytes / max(1, present) - 1.0)


def _correct(prepared: PreparedUNet, corrections: Mapping[str, Tensor]) -> None:
    context = PassContext(config=prepared.qdiff_config, signature=prepared.signature)
    CorrectBiases(corrections).run(prepared.graph_module, context)


def _apply(prepared: PreparedUNet, graph_module: fx.GraphModule, raises: tuple[Raise, ...]) -> None:
    context = PassContext(config=prepared.qdiff_config, signature=prepared.signature)
    ApplyRaises(raises).run(graph_module, context)
