"""What a DIR or MODEL argument names: a bundled model, a diffusers folder, or a quantized folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import qdiff_fx
from qdiff_fx.assets import conditional_path, unconditional_path
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.errors import CheckpointError, InputError
from qdiff_fx.evaluation import Trajectory, sample_ddim, sample_ddim_guided
from qdiff_fx.safe_io import read_json

BUNDLED: Mapping[str, Callable[[], Path]] = {"fashion-uncond": unconditional_path, "fashion-cond": conditional_path}
_PLAN, _CONFIG, _SCHEDULER, _CONTEXT = "plan.json", "config.json", "scheduler", "context.safetensors"
_GUIDANCE = 3.0


@dataclass(frozen=True, kw_only=True)
class Source:
    """A network and what it takes to sample with it.

    Args:
      name: as the user wrote it.
      folder: where it lies.
      unet: full precision, in fp32 and eval mode, or a QuantizedUNet.
      scheduler: of diffusers; None if the folder has none.
      context: [N + 1, T, D], N prompts and the empty one; None for unconditional networks.
    """

    name: str
    folder: Path
    unet: Any
    scheduler: Any
    context: Tensor | None

    @property
    def quantized(self) -> bool:
        """Whether the network is an integer model."""
        return isinstance(self.unet, qdiff_fx.QuantizedUNet)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what it denoises."""
        size = self.unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.unet.config["in_channels"]), height, width

    def noise(self, samples: int, seed: int) -> Tensor:
        """[samples, C, H, W] standard normal."""
        return torch.randn(samples, *self.sample_shape, generator=torch.Generator().manual_seed(seed))

    def sampler(
        self, noise: Tensor, *, steps: int, guidance_scale: float | None, keep_steps: bool = False
    ) -> Callable[[Callable[..., Any]], Trajectory]:
        """Samples from `noise` with any network that is called like this one; row i gets prompt i modulo N.

        Raises: InputError if there is no scheduler, or no context for a conditional network.
        """
        scheduler = self.require_scheduler()
        if not self.is_conditional:
            return lambda unet: sample_ddim(unet, scheduler, noise, num_inference_steps=steps, keep_steps=keep_steps)
        context = self.require_context()
        chosen = context[torch.arange(len(noise)) % (len(context) - 1)]
        return lambda unet: sample_ddim_guided(
            unet,
            scheduler,
            noise,
            context=chosen,
            empty_context=context[-1:],
            guidance_scale=_GUIDANCE if guidance_scale is None else guidance_scale,
            num_inference_steps=steps,
            keep_steps=keep_steps,
        )

    def collect(self, *, guidance_scale: float | None, **options: Any) -> CalibrationSet:
        """Calibration data of the full-precision network; `options` are those of CalibrationSet.collect."""
        if self.is_conditional:
            context = self.require_context()
            guidance_scale = _GUIDANCE if guidance_scale is None else guidance_scale
            options |= {"guidance_scale": guidance_scale, "encoder_hidden_states": context[:-1]}
            options |= {"negative_encoder_hidden_states": context[-1:]} if guidance_scale > 1 else {}
        return CalibrationSet.collect(self.unet, scheduler=self.require_scheduler(), **options)

    @property
    def is_conditional(self) -> bool:
        """Whether the network takes a context."""
        return self.context_width is not None

    @property
    def context_width(self) -> Any:
        """Channels of the context, by block where they differ; None for unconditional networks."""
        return self.unet.config.get("cross_attention_dim")

    def require_scheduler(self) -> Any:
        """The scheduler. Raises InputError if the folder has none."""
        if self.scheduler is None:
            raise InputError(f"{self.name}: no {_SCHEDULER}/ beside the network; name the folder of the whole pipeline")
        return self.scheduler

    def require_context(self) -> Tensor:
        """The contexts. Raises InputError if there are none."""
        if self.context is None:
            raise InputError(
                f"{self.name}: a conditional network without contexts; pass --context FILE.safetensors with a tensor "
                f"'context' [N, T, D] whose last row is the empty prompt"
            )
        return self.context


def add_source_arguments(parser: Any, *, guidance: bool = True) -> None:
    """--context, and --guidance where sampling takes place."""
    parser.add_argument(
        "--context", type=Path, metavar="FILE", help="safetensors with 'context' [N, T, D], the empty prompt last"
    )
    if guidance:
        parser.add_argument(
            "--guidance",
            type=float,
            metavar="G",
            help=f"guidance scale of conditional models (a pipeline's own; {_GUIDANCE:g} for a network alone)",
        )


def open_source(name: str, *, context: Path | None = None, backend: str = "auto") -> Source:
    """The model that `name` stands for.

    Args:
      name: a key of BUNDLED; a folder with unet/ and scheduler/; a UNet's own folder; a quantized folder,
        or a pipeline's with a quantized unet/.
      context: contexts to use instead of the folder's own.
      backend: of a quantized model.

    Raises: InputError if it is none of these; CheckpointError if it is damaged.
    """
    folder = BUNDLED[name]() if name in BUNDLED and not Path(name).exists() else Path(name)
    if not folder.is_dir():
        raise InputError(f"{name}: no such folder; want one, or a bundled model: {', '.join(BUNDLED)}")
    unet: Any
    stored = next((item for item in (folder, folder / "unet") if (item / _PLAN).is_file()), None)
    if stored is not None:
        unet = qdiff_fx.load(stored, backend=backend)
    elif (folder / "unet" / _CONFIG).is_file():
        unet = _load_unet(folder / "unet")
    elif (folder / _CONFIG).is_file():
        unet = _load_unet(folder)
    else:
        raise InputError(f"{name}: neither unet/{_CONFIG}, {_CONFIG} nor {_PLAN} is in it; name a diffusers folder")
    contexts = context if context is not None else folder / _CONTEXT
    return Source(
        name=name,
        folder=stored or folder,
        unet=unet,
        scheduler=_load_scheduler(folder),
        context=load_context(contexts) if context is not None or contexts.is_file() else None,
    )


def require_full_precision(source: Source) -> Source:
    """`source` itself. Raises InputError if it is quantized already."""
    if source.quantized:
        raise InputError(f"{source.name}: is quantized already; name the full-precision model")
    return source


def copy_sampling_files(source: Source, folder: Path) -> None:
    """Put scheduler and contexts beside a quantized model, so that its folder can be sampled from."""
    if source.scheduler is not None:
        source.scheduler.save_pretrained(folder / _SCHEDULER)
    if source.context is not None:
        own = source.folder / _CONTEXT
        if own.is_file():
            shutil.copyfile(own, folder / _CONTEXT)
        else:
            save_file({"context": source.context.contiguous()}, folder / _CONTEXT)


def _load_unet(folder: Path) -> Any:
    unet_class = _diffusers_class(folder / _CONFIG)
    if not issubclass(unet_class, ModelMixin):
        raise InputError(f"{folder / _CONFIG}: {unet_class.__name__} is no diffusers model; name the folder of a UNet")
    try:
        unet: Any = unet_class.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: diffusers cannot load it ({error}); restore the folder") from error
    return unet.float().eval()


def _load_scheduler(folder: Path) -> Any:
    path = next((item for item in (folder, folder.parent) if (item / _SCHEDULER).is_dir()), None)
    if path is None:
        return None
    config = path / _SCHEDULER / "scheduler_config.json"
    return _diffusers_class(config).from_config(read_json(config))


def _diffusers_class(config: Path) -> Any:
    name = str(read_json(config).get("_class_name"))
    found = getattr(diffusers, name, None) if name.isidentifier() else None
    if not isinstance(found, type) or not hasattr(found, "from_config"):
        raise InputError(f"{config}: _class_name {name!r} is no class of diffusers {diffusers.__version__}")
    return found


def load_context(path: Path) -> Tensor:
    """[N, T, D] contexts from a file. Raises InputError if it holds none."""
    if not path.is_file():
        raise InputError(f"--context {path}: no such file")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); write it again") from error
    context = tensors.get("context")
    if context is None or context.dim() != 3 or len(context) < 2:
        raise InputError(f"{path}: want a tensor 'context' [N, T, D] of 2 rows or more, the empty prompt last")
    return context.float()
