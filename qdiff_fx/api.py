"""The verbs: prepare, calibrate, convert, save, load. Wiring only."""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from qdiff_fx.allocation.estimate import estimate_errors
from qdiff_fx.allocation.observed_factors import equalize_from_maxima
from qdiff_fx.allocation.sensitivity import SensitivityReport, measure_sensitivity, warn_of_estimate
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.driver import (
    check_data,
    fit_activations,
    fit_weights,
    observed_maxima,
    observed_offsets,
    reset,
)
from qdiff_fx.calibration.progress import named_steps
from qdiff_fx.calibration.report import CalibrationReport
from qdiff_fx.checkpoint import DEFAULT_SHARD_BYTES
from qdiff_fx.checks import calibration_set, check_calibrate, check_prepare, check_stage
from qdiff_fx.config import QDiffConfig
from qdiff_fx.errors import ConversionError
from qdiff_fx.examples import example_call
from qdiff_fx.fake_quantize import NoiseLevel
from qdiff_fx.graph.capture import capture
from qdiff_fx.graph.edit import freeze_parameters, pruned, shared_copy
from qdiff_fx.graph.propagate import refresh
from qdiff_fx.identity import config_digest, digest, state_digest
from qdiff_fx.kernels import select_backend
from qdiff_fx.lowering import check_choices
from qdiff_fx.model import PreparedUNet, QuantizedUNet
from qdiff_fx.passes.base import PassContext, run_passes
from qdiff_fx.passes.carrier import check_carrier, set_carrier
from qdiff_fx.passes.convert import CONVERT
from qdiff_fx.passes.prepare import PREPARE
from qdiff_fx.reconstruction import ReconstructionConfig
from qdiff_fx.stages import correct_biases, fitting_anew, layer_input_means, observe_and_fit, run_stages

logger = logging.getLogger(__name__)


def prepare(
    unet: nn.Module,
    config: QDiffConfig | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> PreparedUNet:
    """`unet` as a graph with observers and fake-quantize modules in it; `unet` itself is not changed.

    Args:
      unet: a diffusers UNet, or any nn.Module together with an example call; in eval mode.
      config: what to quantize; None is `QDiffConfig.preset("w4a8")`.
      example_inputs, example_kwargs: an example call with a batch of 2 or more. It fixes the call's form: optional
        inputs that are given here must be given in every later call, others must not.
      progress: show a progress bar; None does so on a terminal.

    Raises:
      InputError: for a pipeline, an already prepared or converted model, or a module without example inputs.
      CaptureError: if the module's Python cannot be captured; names the submodule and the reason.
    """
    config = QDiffConfig.preset("w4a8") if config is None else config
    check_prepare(unet, config)
    is_diffusers = isinstance(unet, ModelMixin) and "return_dict" in inspect.signature(unet.forward).parameters
    if example_inputs is None and example_kwargs is None:
        example_inputs, example_kwargs = example_call(unet)
    with named_steps("prepare", total=1 + len(PREPARE), progress=progress) as begin:
        begin("capture")
        captured = capture(
            unet,
            example_inputs or (),
            example_kwargs,
            sample_input=config.sample_input,
            forced={"return_dict": False} if is_diffusers else None,
        )
        context = PassContext(config=config, signature=captured.signature, noise_level=NoiseLevel())
        results = run_passes(PREPARE, captured.graph_module, context, begin)
    return PreparedUNet(
        captured.graph_module,
        config,
        context.noise_level,
        results,
        signature=captured.signature,
        output=captured.output,
        model_config=dict(getattr(unet, "config", None) or {}) if isinstance(unet, ModelMixin) else {},
        returns_dict=is_diffusers,
    )


def calibrate(
    prepared: PreparedUNet,
    data: CalibrationSet | Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
    *,
    reconstruction: ReconstructionConfig | None = None,
    checkpoint_dir: str | Path | None = None,
    holdout: CalibrationSet | None = None,
    scheduler: Any = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> CalibrationReport:
    """Fix every quantizer of `prepared` from `data`; afterwards `prepared` simulates the quantized network.

    What was observed or fitted before is forgotten; layers that were raised stay raised.
    Observes ranges, folds channel factors (`config.equalize`), spends the slacks on the quantizers that cause most of
    the error, learns rounding and step sizes if asked, corrects the biases of layers that are rounded to nearest
    (`config.bias_correction`), raises further layers until `config.target_sqnr` is reached, and measures the output
    SQNR on samples that no fit has seen; below 10 dB it warns with the layers and the remedy.

    Args:
      data: a CalibrationSet, or a list of (args, kwargs) calls.
      reconstruction: learn weight rounding and activation steps block by block, e.g.
        `ReconstructionConfig.preset("fast")`; None keeps rounding to nearest and the observers' steps.
      holdout: samples to measure quality on; None sets a seeded tenth of `data` aside. Learning and a target choose
        networks by another tenth, where that is at least four rows a timestep.
      scheduler: the diffusers scheduler that the model will sample with; a set that was collected with another noise
        process (betas, prediction type) is refused. None does not check: a network alone has no scheduler.
      checkpoint_dir: where the observation and each finished block are kept, so that a killed run continues.
      batch_size: rows a forward pass.
      progress: show progress bars; None does so on a terminal.

    Raises:
      CalibrationError: for an empty set, one of another model, or a target that is out of reach (with the best figure).
      CheckpointError: if `checkpoint_dir` holds a run of another model, config or calibration set.
      NonFiniteError: NaN or infinity in weights or activations, naming the layer.
    """
    data = check_calibrate(prepared, data, holdout, reconstruction, scheduler, batch_size)
    with fitting_anew(prepared):
        return run_stages(prepared, data, holdout, reconstruction, checkpoint_dir, batch_size, progress)


def sensitivity(
    prepared: PreparedUNet,
    data: CalibrationSet | Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
    *,
    samples: int = 64,
    batch_size: int = 32,
    checkpoint_dir: str | Path | None = None,
    progress: bool | None = None,
) -> SensitivityReport:
    """The output error that quantizing each weight, layer input, attention and block alone causes, worst first.

    One forward pass over `samples` rows for each of them, beside what the estimate that allocation uses predicts;
    warns where the two rank layers differently (rank correlation under 0.8).
    An uncalibrated model is observed and fitted on `data` first, at its config's bits; nothing is raised.

    Args:
      data: a CalibrationSet, or a list of (args, kwargs) calls.
      samples: rows that are measured, evenly over the timesteps.
      batch_size: rows a forward pass.
      checkpoint_dir: where finished figures are kept, so that a killed run continues.
      progress: show progress bars; None does so on a terminal.

    Raises:
      CalibrationError: for an empty set or one of another model.
      CheckpointError: if `checkpoint_dir` holds figures of another model, config or set.
    """
    check_stage(prepared, "sensitivity")
    data = calibration_set(data)
    check_data(data, prepared.signature, dict(prepared.config))
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    means = layer_input_means(prepared, data, progress=progress)
    if not prepared.calibrated:
        reset(prepared.graph_module)
        observe_and_fit(prepared, data, batch_size, folder, progress)
        correct_biases(prepared, means)
    seed = prepared.qdiff_config.seed
    identity = ""
    if folder is not None:
        config, state = config_digest(prepared.qdiff_config), state_digest(prepared)
        identity = digest(f"{config} {batch_size} {data.fingerprint} {state} {samples}")
    report = measure_sensitivity(
        prepared.graph_module,
        prepared.signature,
        data,
        estimate=estimate_errors(
            prepared.graph_module, prepared.signature, data, means=means, seed=seed, progress=progress
        ),
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        identity=identity,
        checkpoint_dir=folder,
        progress=progress,
    )
    warn_of_estimate(report, stacklevel=3)  # the caller of sensitivity()
    return report


def convert(
    prepared: PreparedUNet,
    backend: str = "auto",
    *,
    strict: bool = False,
    autotune: bool = False,
    dtype: torch.dtype | None = None,
    release: bool = False,
    progress: bool | None = None,
) -> QuantizedUNet:
    """`prepared` with packed integer weights and integer operators, lowered to `backend`.

    A model that was observed but not calibrated (prepare, run your sampler, convert) gets its grids now, with channel
    factors from the observed maxima (`config.equalize`); the log says that its quality was not measured. Warns of
    a bfloat16 carrier that loses a tensor, one whose channels lie around large constants.

    Args:
      backend: "auto", or a name in `qdiff_fx.kernels.BACKENDS`.
      strict: compute what the plan says everywhere: attention keeps its quantizers, simulated where the backend has
        no integer kernel for it; a layer that would run in floating point instead of integers is refused.
      autotune: time every layer on integers and in the carrier type, for the sizes of the calibration set (of the
        example call, where there was none) and two rows, and take the faster (x86, and cuda, where block shapes and
        attention are timed too; other backends have nothing to choose);
        `save` keeps the times, by machine. With backend="auto" on a CPU, also time a step on x86 and on openvino, where
        both are installed, and take the faster one. Off, x86 runs every integer layer on integers, and cuda chooses by
        its performance model.
      dtype: the carrier type; None keeps the model's own.
      release: consume `prepared`: its floating weights are freed as they are packed, it cannot be used again, not even
        after an error that comes later than the check of the backend.
      progress: show progress bars; None does so on a terminal.

    Raises:
      InputError: for `strict` and `autotune` together.
      ConversionError: for anything but what `prepare` returned; for an fp16 carrier where calibration saw |x| above
        16,384, naming the tensor.
      CalibrationError: if an activation was never observed; names the first such node.
      BackendError: for an unknown or unavailable backend, or a fallback under `strict`.
    """
    check_stage(prepared, "convert")
    check_choices(strict=strict, autotune=autotune)
    select_backend(backend, prepared.device.type)  # before anything is consumed
    maxima = prepared.calibration.get("maxima") or observed_maxima(prepared.graph_module)
    offsets = prepared.calibration.get("offsets") or observed_offsets(prepared.graph_module)
    check_carrier(prepared.dtype if dtype is None else dtype, maxima, offsets)
    fit_activations(prepared.graph_module)
    fit_weights(prepared.graph_module, progress=progress)
    if not prepared.calibrated:
        _finish_short_way(prepared)
    graph_module = prepared.graph_module if release else shared_copy(prepared.graph_module)
    if release:
        prepared.graph_module = torch.fx.GraphModule({}, torch.fx.Graph())
        prepared.qdiff_stage = "released"
        gc.collect()  # the original module, if it was let go, may hang in the reference cycles of its capture
    context = PassContext(config=prepared.qdiff_config, signature=prepared.signature)
    with named_steps("convert", total=len(CONVERT), progress=progress) as begin:
        run_passes(CONVERT, graph_module, context, begin)
    plan = pruned(graph_module)
    freeze_parameters(plan)
    signature = prepared.signature
    if shapes := prepared.calibration.get("shapes"):
        refresh(plan, signature, shapes)
    if dtype is not None:
        signature = set_carrier(plan, signature, dtype)
    return QuantizedUNet(
        plan,
        prepared.qdiff_config,
        backend=backend,
        strict=strict,
        autotune=autotune,
        calibration=prepared.calibration,
        progress=progress,
        signature=signature,
        output=prepared.output,
        model_config=dict(prepared.config),
        returns_dict=prepared.returns_dict,
    )


def save(
    quantized: QuantizedUNet,
    directory: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool | None = None,
) -> None:
    """Make `directory` hold `quantized`: plan.json and safetensors, whatever the backend.

    Atomic: a kill or a full disk leaves the model that the directory held before.

    Args:
      quantized: what `convert` or `load` returned; compiled or not.
      max_shard_bytes: tensors are divided into files of at most so many bytes.
      progress: show a progress bar; None does so on a terminal.

    Raises:
      ConversionError: for a model that is not converted.
      CheckpointError: for an operator that the format does not allow, naming its node; or if the disk is full.
    """
    model = getattr(quantized, "_orig_mod", quantized)
    if not isinstance(model, QuantizedUNet):
        raise ConversionError(f"save() takes what convert() returned, got a {type(model).__name__}; call convert first")
    model.save(directory, max_shard_bytes=max_shard_bytes, progress=progress)


def load(
    directory: str | Path,
    backend: str = "auto",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    strict: bool = False,
    autotune: bool = False,
    progress: bool | None = None,
) -> QuantizedUNet:
    """The model that `save` wrote, lowered to `backend`; needs neither the original module nor its weights.

    Nothing in the directory is trusted: operators come from a list, names, shapes and hashes are checked. Integer
    weights stay mapped to their file on the CPU. Warns of a model that calibrate() warned of; the quality that was
    measured is in the result's `calibration["quality"]`.

    Args:
      backend: "auto", or a name in `qdiff_fx.kernels.BACKENDS`.
      device: where the tensors go.
      dtype: the carrier type; None keeps the one that it was saved in. What bfloat16 rounded stays rounded in float32.
      strict: refuse any fallback from integer kernels.
      autotune: as in `convert`; times that the directory holds for this machine are used, others are taken and added
        to it (autotune.json).
      progress: show progress bars; None does so on a terminal.

    Raises:
      CheckpointError: for a missing, damaged or edited file, or another format version; names the file and field.
      ConversionError: for an fp16 carrier where calibration saw |x| above 16,384, naming the tensor.
      BackendError: for an unknown or unavailable backend or device, or a fallback under `strict`.
    """
    return QuantizedUNet.load(
        directory, backend, device=device, dtype=dtype, strict=strict, autotune=autotune, progress=progress
    )


def _finish_short_way(prepared: PreparedUNet) -> None:
    """What calibrate() would have done without data, once, and word of what it could not do."""
    factors = equalize_from_maxima(prepared.graph_module) if prepared.qdiff_config.equalize else ()
    logger.warning(
        "converted from observed ranges alone (%d tensors equalised): quality was not measured; "
        "calibrate(prepared, data) measures it and spends bits where they matter",
        len(factors),
    )
    prepared.calibrated = True
