"""The stages of calibrate(), one after the other."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import torch

from qdiff_fx.allocation.estimate import estimate_errors
from qdiff_fx.allocation.probe import flat_inputs
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.driver import layer_rows, observed_maxima, observed_offsets, quantizer_rows
from qdiff_fx.calibration.provenance import noise_process
from qdiff_fx.calibration.report import CalibrationReport
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.model import PreparedUNet
from qdiff_fx.numerics.metrics import finite_or_none
from qdiff_fx.reconstruction import BlockResult, ReconstructionConfig
from qdiff_fx.stages.biases import correct_biases, layer_input_means
from qdiff_fx.stages.decide import decide
from qdiff_fx.stages.fit import compares_networks, equalize_attentions, hold_out, observe_and_fit, split_selection
from qdiff_fx.stages.learn import learn_blocks
from qdiff_fx.stages.quality import accepted, measure_quality, quantizer_errors, warn_of_quality
from qdiff_fx.stages.target import meet_target


def run_stages(
    prepared: PreparedUNet,
    data: CalibrationSet,
    holdout: CalibrationSet | None,
    reconstruction: ReconstructionConfig | None,
    checkpoint_dir: str | Path | None,
    batch_size: int,
    progress: bool | None,
) -> CalibrationReport:
    """All of them, one after the other, on a model whose quantizers have forgotten what they knew."""
    started = time.monotonic()
    config, folder = prepared.qdiff_config, None if checkpoint_dir is None else Path(checkpoint_dir)
    data, held = hold_out(data, holdout, config.seed)
    selection = data
    if compares_networks(config, learns=reconstruction is not None):
        data, selection = split_selection(data, config.seed + 1)
    folded = equalize_attentions(prepared, data, progress=progress)
    observe_and_fit(prepared, data, batch_size, folder, progress)
    maxima, offsets = observed_maxima(prepared.graph_module), observed_offsets(prepared.graph_module)
    means = layer_input_means(prepared, data, progress=progress)
    decisions = decide(prepared, data, means, progress=progress)
    blocks: tuple[BlockResult, ...] = ()
    if reconstruction is not None:
        blocks = learn_blocks(prepared, data, selection, reconstruction, batch_size, folder, progress)
    prepared.set_mode(QuantizerMode.QUANTIZE)
    raises = decisions.raises
    corrected = correct_biases(prepared, means)
    if config.target_sqnr is not None:
        raises += meet_target(prepared, data, selection, means, folder, progress)
    quality = measure_quality(prepared, held, progress=progress)
    estimate = decisions.estimate
    if estimate is None and not accepted(quality):  # nothing was to be decided, but the warning names the worst
        estimate = estimate_errors(
            prepared.graph_module, prepared.signature, data, means=means, seed=config.seed, progress=progress
        )
    errors = {} if estimate is None else quantizer_errors(prepared.graph_module, estimate)
    if not accepted(quality):
        warn_of_quality(quality, errors)
    report = CalibrationReport(
        samples=len(data),
        timesteps=data.timesteps,
        fingerprint=data.fingerprint,
        scheduler=noise_process(data.metadata.get("scheduler") or {}),
        seconds=time.monotonic() - started,
        quantizers=tuple(quantizer_rows(prepared.graph_module)),
        maxima=maxima,
        offsets=offsets,
        layers=tuple(layer_rows(prepared.graph_module)),
        reconstruction=tuple(block.to_dict() for block in blocks),
        factors=tuple(asdict(choice) for choice in (*folded, *decisions.factors)),
        raises=tuple(item.to_dict() for item in raises),
        corrected_biases=corrected,
        sensitivity=tuple({"name": name, "error": error} for name, error in errors.items()),
        quality={
            "samples": len(held),
            "pooled_db": finite_or_none(quality.pooled_db),
            "median_db": finite_or_none(quality.median_db),
            "by_timestep": [[timestep, finite_or_none(value)] for timestep, value in quality.by_timestep.items()],
            "accepted": accepted(quality),
        },
    )
    signature = prepared.signature
    row = flat_inputs(data, torch.tensor([0]), signature, prepared.device)
    prepared.calibration = report.summary() | {"shapes": signature.row_shapes(row)}
    return report
