"""Where the bundled models lie, and how to load them without a network."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file

from qdiff_fx.assets.conditional import ConditionalPipeline
from qdiff_fx.errors import CheckpointError

CLASS_NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
"""Fashion-MNIST's classes; the index is the label."""


def unconditional_path() -> Path:
    """The bundled unconditional model: a diffusers folder that `DDIMPipeline.from_pretrained` takes."""
    return _folder("fashion_unconditional", "model_index.json")


def conditional_path() -> Path:
    """The bundled class-conditional model: diffusers folders unet/ and scheduler/, and context.safetensors."""
    return _folder("fashion_conditional", "context.safetensors")


def classifier_path() -> Path:
    """The folder of the bundled Fashion-MNIST classifier: classifier.safetensors and the figures in classifier.json."""
    return _folder("fashion_classifier", "classifier.safetensors")


def load_unconditional() -> DDIMPipeline:
    """The bundled unconditional model, in fp32 and eval mode: grey-scale clothes of 28x28 pixels.

    The weights are stored in fp16 and widened, so every value is an fp16 number.

    Raises: CheckpointError if the package's data files are missing.
    """
    path = unconditional_path()
    # Built from its parts: DDIMPipeline.from_pretrained draws a progress bar that no argument turns off.
    build: Any = DDIMPipeline
    pipeline: DDIMPipeline = build(
        _load(UNet2DModel, path / "unet").float().eval(), _load(DDIMScheduler, path / "scheduler")
    )
    return pipeline


def load_conditional() -> ConditionalPipeline:
    """The bundled class-conditional model, in fp32 and eval mode, with its ten class contexts and the empty prompt.

    Raises: CheckpointError if the package's data files are missing.
    """
    path = conditional_path()
    return ConditionalPipeline(
        unet=_load(UNet2DConditionModel, path / "unet").float().eval(),
        scheduler=_load(DDIMScheduler, path / "scheduler"),
        context=load_file(path / "context.safetensors")["context"],
    )


def _load(diffusers_class: Any, folder: Path) -> Any:
    # Without low_cpu_mem_usage=False diffusers warns where accelerate is not installed; schedulers ignore it.
    return diffusers_class.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)


def _folder(name: str, marker: str) -> Path:
    folder = Path(str(files("qdiff_fx.assets"))) / name
    if not (folder / marker).is_file():
        raise CheckpointError(f"{folder}: no {marker}; the installed package lacks its data files: reinstall qdiff_fx")
    return folder
