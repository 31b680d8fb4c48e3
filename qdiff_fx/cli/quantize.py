"""`qdiff-fx quantize`: prepare, calibrate, convert, save."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import qdiff_fx
from qdiff_fx.ahead_of_time import SUFFIX as PACKAGE_SUFFIX
from qdiff_fx.ahead_of_time import require_packages
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.cli.collect import add_collect_arguments
from qdiff_fx.cli.parser import OneLineParser, add_json_argument, future_file, future_folder, verb_parser
from qdiff_fx.cli.pipelines import PipelineSource, add_prompt_arguments, open_model, publish_pipeline
from qdiff_fx.cli.sources import Source, add_source_arguments, copy_sampling_files, require_full_precision
from qdiff_fx.config import QDiffConfig
from qdiff_fx.errors import QualityError
from qdiff_fx.identity import config_digest, digest, tensors_digest
from qdiff_fx.reconstruction.config import PRESETS
from qdiff_fx.report.documents import calibration_document, stored_bytes
from qdiff_fx.report.inspection import inspect_prepared
from qdiff_fx.report.tables import decibels, file_size
from qdiff_fx.safe_io import read_json, write_json
from qdiff_fx.stages.fit import compares_networks

_DATA, _RUN, _BUILT = _WORK_FOLDERS = ("calibration", "calibration-run", "built")
"""What a run keeps in its work folder: inputs, the state of calibrate(), the finished model."""


def parser() -> OneLineParser:
    """Arguments of this verb."""
    result = verb_parser(
        "quantize",
        "Turn a model into one with packed integer weights and save it; without --calibration, collect data first.\n"
        "A pipeline folder (model_index.json) becomes a pipeline folder that DiffusionPipeline.from_pretrained loads\n"
        "after `import qdiff_fx`; prompts calibrate a text-to-image pipeline.",
        "qdiff-fx quantize fashion-uncond --preset w4a8 --out unet-w4a8 --calibration calibration",
    )
    result.add_argument("model", metavar="DIR", help="a diffusers folder, or fashion-uncond, fashion-cond")
    result.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the quantized model")
    result.add_argument("--preset", default="w4a8", help="w8a8, w4a8 (default), w8a32, w4a32, w4a6 or w4a4")
    result.add_argument("--calibration", type=Path, metavar="SET", help="folder that qdiff-fx collect wrote")
    result.add_argument("--reconstruction", choices=tuple(PRESETS), help="learn rounding and steps")
    result.add_argument("--target-sqnr", type=float, metavar="DB", help="raise layers until the output keeps so much")
    result.add_argument("--accept-quality", action="store_true", help="write --out even if the output is ruined")
    result.add_argument(
        "--checkpoint-dir",
        type=Path,
        metavar="DIR",
        help="where a killed or refused run continues from (OUT.work, removed when the model is written)",
    )
    result.add_argument(
        "--aot",
        type=Path,
        metavar="FILE.pt2",
        help="also compile for this CPU ahead of time; qdiff_fx.load(OUT, 'x86').compile(package=FILE) runs the code "
        "(OUT/unet of a pipeline)",
    )
    add_collect_arguments(result)
    add_source_arguments(result)
    add_prompt_arguments(result)
    add_json_argument(result)
    return result


def run(arguments: Namespace) -> None:
    """Quantize and save; say how large the result is.

    Raises: QualityError if the output is ruined and `--accept-quality` is not given; the work is kept. BackendError if
      `--aot` is given where nothing can be compiled ahead of time.
    """
    config = QDiffConfig.preset(arguments.preset, target_sqnr=arguments.target_sqnr)
    future_folder(arguments.out)
    if arguments.checkpoint_dir is not None:
        future_folder(arguments.checkpoint_dir, "--checkpoint-dir")
    if arguments.aot is not None:
        future_file(arguments.aot, PACKAGE_SUFFIX, "--aot")
        require_packages()
    source = require_full_precision(open_model(arguments))
    if isinstance(source, PipelineSource):
        source.check_out(arguments.out)
    work: Path = arguments.checkpoint_dir or arguments.out.with_name(arguments.out.name + ".work")
    data = _data(source, arguments, work)
    identity = _identity(source, config, data, arguments)
    built = work / _BUILT
    if not _is_of(built, identity):
        _build(source, config, data, arguments, built, identity)
    document = read_json(built / "calibration.json")
    quality = document["quality"]
    if not quality["accepted"] and not arguments.accept_quality:
        raise QualityError(
            f"nothing written to {arguments.out}: the output keeps {decibels(quality['pooled_db'])} dB pooled, "
            f"{decibels(quality['median_db'])} dB in the median; try --target-sqnr 20 or --preset w8a8, "
            f"or repeat the command with --accept-quality (the work is kept in {work})"
        )
    _publish(source, built, arguments.out)
    if arguments.aot is not None:
        qdiff_fx.load(built, backend="x86").package(arguments.aot)
    if arguments.checkpoint_dir is None:
        _discard(work)
    stored = document["sizes"][arguments.preset]
    share = stored / document["sizes"]["fp32"]
    if arguments.json:
        result = {"out": str(arguments.out), "preset": arguments.preset, "bytes": stored, "share_of_fp32": share}
        if arguments.aot is not None:
            result["package"] = str(arguments.aot)
        print(json.dumps(result | {"quality": quality, "raises": document["raises"]}, indent=1))
        return
    print(
        f"{arguments.out}: {arguments.preset.upper()}, {file_size(stored)}, {share:.3f} of fp32; output SQNR "
        f"{decibels(quality['pooled_db'])} dB pooled, {decibels(quality['median_db'])} dB in the median"
    )
    if arguments.aot is not None:
        print(f"{arguments.aot}: its code, compiled ahead of time for this machine")


def _build(
    source: Source, config: QDiffConfig, data: CalibrationSet, arguments: Namespace, folder: Path, identity: str
) -> None:
    """Everything up to a complete quantized folder, with the identity of the run written last."""
    prepared = qdiff_fx.prepare(source.unet, config)
    preset = arguments.reconstruction
    report = qdiff_fx.calibrate(
        prepared,
        data,
        reconstruction=None if preset is None else qdiff_fx.ReconstructionConfig.preset(preset),
        checkpoint_dir=folder.parent / _RUN / _settings(config, preset),
        scheduler=source.scheduler,
    )
    inspection = inspect_prepared(prepared)
    source.unet.to("meta")  # nothing reads it any more: its weights go as they are packed
    quantized = qdiff_fx.convert(prepared, release=True)
    qdiff_fx.save(quantized, folder)
    copy_sampling_files(source, folder)
    stored = stored_bytes(folder)
    document = calibration_document(source.name, arguments.preset, report, inspection, quantized, stored)
    write_json(folder / "calibration.json", document | {"identity": identity})


def _settings(config: QDiffConfig, preset: str | None) -> str:
    """A name for what calibrate() keeps: the same for every target, which starts from the same fit and rounding."""
    fewer_rows = compares_networks(config, learns=preset is not None)
    return digest(f"{config_digest(config)} {preset} {fewer_rows}")[:16]


def _publish(source: Source, built: Path, out: Path) -> None:
    """Write what was built to `out`; a kill leaves the model that `out` held before."""
    if isinstance(source, PipelineSource):
        publish_pipeline(source, built, out)
    else:
        qdiff_fx.save(qdiff_fx.load(built, backend="reference"), out)
        copy_sampling_files(source, out)
    write_json(out / "calibration.json", read_json(built / "calibration.json"))


def _discard(work: Path) -> None:
    """Remove what this verb put into `work`, and the folder itself if nothing else is in it."""
    for name in _WORK_FOLDERS:
        shutil.rmtree(work / name, ignore_errors=True)
    if not any(work.iterdir()):
        work.rmdir()


def _is_of(folder: Path, identity: str) -> bool:
    """Whether `folder` holds the finished result of this very run."""
    file = folder / "calibration.json"
    return file.exists() and read_json(file).get("identity") == identity


def _identity(source: Source, config: QDiffConfig, data: CalibrationSet, arguments: Namespace) -> str:
    """SHA-256 over everything that the result depends on."""
    settings = json.dumps(config.to_dict(), sort_keys=True)
    text = f"{settings}{arguments.reconstruction} {data.fingerprint}"
    return tensors_digest(text, source.unet.state_dict().items(), progress=None)


def _data(source: Source, arguments: Namespace, work: Path) -> CalibrationSet:
    if arguments.calibration is not None:
        return CalibrationSet.load(arguments.calibration)
    return source.collect(
        guidance_scale=arguments.guidance,
        num_inference_steps=arguments.steps,
        num_timesteps=arguments.timesteps,
        samples_per_timestep=arguments.samples,
        batch_size=arguments.batch_size,
        strategy=arguments.strategy,
        seed=arguments.seed,
        path=work / _DATA,
    )
