"""Whole pipeline folders of diffusers: opened, calibrated from prompts, written with an integer network inside."""

from __future__ import annotations

import importlib
import inspect
import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import qdiff_fx
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.progress import shows_progress
from qdiff_fx.cli.sources import Source, load_context, open_source
from qdiff_fx.errors import CheckpointError, InputError
from qdiff_fx.safe_io import path_inside, read_json, write_json

INDEX = "model_index.json"
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_UNET, _PLAN = "unet", "plan.json"
_OURS = ["qdiff_fx.model", "QuantizedUNet"]
_OTHER_FORMATS = ("*.bin", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data")


@dataclass(frozen=True, kw_only=True)
class PipelineSource(Source):
    """A whole pipeline, whose network is to be quantized.

    Args:
      pipe: of diffusers.
      prompts: what to calibrate with; empty if none were given.
    """

    pipe: Any
    prompts: tuple[str, ...] = ()

    def check_out(self, out: Path) -> None:
        """Raise InputError if writing to `out` would destroy what is quantized."""
        if out.resolve() == self.folder.resolve():
            raise InputError(f"--out {out}: is the pipeline that is quantized; choose another folder")

    def collect(self, *, guidance_scale: float | None, **options: Any) -> CalibrationSet:
        """Calibration data of the pipeline's own sampler and guidance, from the prompts if it takes any."""
        if self.context is not None or not takes(self.pipe, "prompt"):
            return super().collect(guidance_scale=guidance_scale, **options)
        if not self.prompts:
            raise InputError(
                f"{self.name}: {type(self.pipe).__name__} makes pictures from prompts; pass --prompts FILE, one a "
                f"line, or --prompt TEXT, or --calibration SET"
            )
        if guidance_scale is None:
            guidance_scale = float(inspect.signature(self.pipe.__call__).parameters["guidance_scale"].default)
        return CalibrationSet.collect(self.pipe, prompts=self.prompts, guidance_scale=guidance_scale, **options)


def add_prompt_arguments(parser: Any) -> None:
    """--prompts, --prompt and --dtype."""
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts of a text-to-image pipeline, one a line")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="one prompt; may be repeated")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="type that a pipeline is loaded in (fp32)"
    )


def open_model(arguments: Namespace) -> Source:
    """What `arguments.model` names: a whole pipeline folder, or what `open_source` opens.

    Raises: InputError if it is nothing of that, or for prompts that nothing takes.
    """
    name, prompts = arguments.model, read_prompts(arguments)
    if prompts and arguments.context is not None:
        raise InputError("--context and prompts exclude each other; pass one of them")
    if not is_pipeline(name):
        if prompts:
            raise InputError(f"{name}: prompts need the folder of a whole pipeline, with {INDEX} and a text encoder")
        return open_source(name, context=arguments.context)
    pipe = load_pipeline(name, dtype=DTYPES[arguments.dtype])
    if prompts and not takes(pipe, "prompt"):
        raise InputError(f"{name}: {type(pipe).__name__} takes no prompts; leave them out")
    return PipelineSource(
        name=name,
        folder=Path(name),
        unet=pipe.unet,
        scheduler=pipe.scheduler,
        context=None if arguments.context is None else load_context(arguments.context),
        pipe=pipe,
        prompts=prompts,
    )


def is_pipeline(name: str) -> bool:
    """Whether `name` is the folder of a whole pipeline, not a bundled model or a network alone."""
    return (Path(name) / INDEX).is_file()


def load_pipeline(name: str, *, dtype: torch.dtype = torch.float32, backend: str = "auto") -> Any:
    """The pipeline in the folder `name`; one with an integer network is loaded in that network's carrier type.

    Args:
      dtype: of a full-precision pipeline.
      backend: of an integer network.

    Raises: InputError if it has no UNet; CheckpointError if diffusers cannot load it.
    """
    folder = Path(name)
    if _component(read_json(folder / INDEX), _UNET) is None:
        raise InputError(f"{folder / INDEX}: names no {_UNET}; qdiff_fx quantizes UNets, not transformers")
    parts: dict[str, Any] = {}
    if (folder / _UNET / _PLAN).is_file():
        parts[_UNET] = qdiff_fx.load(folder / _UNET, backend=backend)
        dtype = parts[_UNET].dtype
    load: Any = DiffusionPipeline.from_pretrained
    try:
        with _quiet_libraries():
            return load(folder, local_files_only=True, torch_dtype=dtype, **parts)
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name}: diffusers cannot load the pipeline ({first}); restore the folder, or install what it names"
        ) from error


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No bars of the libraries that load the parts, where nobody looks; afterwards all is as it was."""
    names = ("diffusers.utils.logging", "transformers.utils.logging")
    modules: list[Any] = [importlib.import_module(name) for name in names if find_spec(name.partition(".")[0])]
    loud = [module for module in modules if not shows_progress(None) and module.is_progress_bar_enabled()]
    for module in loud:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in loud:
            module.enable_progress_bar()


def publish_pipeline(source: PipelineSource, built: Path, out: Path) -> None:
    """Make `out` the pipeline of `source` with the network that `built` holds; its index is written last.

    Every other part is copied as it is stored; where a part has safetensors, its other formats are left out.
    """
    index = read_json(source.folder / INDEX)
    for name in index:
        if name != _UNET and _component(index, name) is not None:
            _copy_part(path_inside(source.folder, name), out / name)
    qdiff_fx.load(built, backend="reference").save_pretrained(out / _UNET)
    write_json(out / INDEX, index | {_UNET: _OURS})


def read_prompts(arguments: Namespace) -> tuple[str, ...]:
    """The prompts of --prompts and --prompt. Raises InputError for a file without any."""
    prompts = list(arguments.prompt)
    file: Path | None = getattr(arguments, "prompts", None)
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--prompts {file}: cannot be read ({error}); want UTF-8 text, one prompt a line"
            ) from error
        found = [line for line in lines if line]
        if not found:
            raise InputError(f"--prompts {file}: holds no prompt; want one a line")
        prompts += found
    if any(not prompt.strip() for prompt in prompts):
        raise InputError("--prompt: is empty; want a text")
    return tuple(prompts)


def takes(pipe: Any, argument: str) -> bool:
    """Whether a call of the pipeline takes this argument."""
    return argument in inspect.signature(pipe.__call__).parameters


def _component(index: Mapping[str, Any], name: str) -> list[str] | None:
    """[library, class] of a part of the pipeline; None for settings and for parts that it does without."""
    value = index.get(name)
    is_part = isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value)
    return value if is_part else None


def _copy_part(source: Path, target: Path) -> None:
    """Make `target` a copy of the folder `source`."""
    if not source.is_dir():
        raise CheckpointError(f"{source}: is missing; restore the pipeline's folder")
    stored_safely = any(source.glob("*.safetensors"))
    try:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*(_OTHER_FORMATS if stored_safely else ())))
    except (OSError, shutil.Error) as error:
        raise CheckpointError(f"{target}: cannot be written ({error}); free space or choose another folder") from error
