"""Pictures of a whole pipeline, from prompts or from noise alone."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.cli.pipelines import DTYPES, load_pipeline, read_prompts, takes
from qdiff_fx.errors import InputError


def pipeline_pictures(arguments: Namespace) -> Tensor:
    """[N, C, H, W] in [0, 1], on the CPU: N of --samples, or one a prompt; picture i gets prompt i modulo their number.

    Picture i starts from the noise of seed + i, whatever the network.

    Raises: InputError if prompts are missing, or the pipeline wants more than prompts.
    """
    pipe = load_pipeline(arguments.model, dtype=DTYPES[arguments.dtype], backend=arguments.backend)
    prompts, name = read_prompts(arguments), f"{arguments.model}: {type(pipe).__name__}"
    call: dict[str, Any] = {"num_inference_steps": arguments.steps, "output_type": "np"}
    if takes(pipe, "image") or not (takes(pipe, "prompt") or takes(pipe, "batch_size")):
        raise InputError(f"{name} wants more than prompts; call DiffusionPipeline.from_pretrained(...) from Python")
    if not takes(pipe, "prompt"):
        if prompts:
            raise InputError(f"{name} takes no prompts; leave them out")
        count = arguments.samples or 16
        with _counted(pipe, arguments.steps):
            return _tensor(pipe(batch_size=count, generator=_generators(arguments.seed, count), **call).images)
    if not prompts:
        raise InputError(f"{name} makes pictures from prompts; pass --prompt TEXT or --prompts FILE")
    call |= {} if arguments.guidance is None else {"guidance_scale": arguments.guidance}
    generators = _generators(arguments.seed, arguments.samples or len(prompts))
    # One at a time: a batch of large pictures need not fit into memory.
    with _counted(pipe, arguments.steps * len(generators)):
        pictures = [
            pipe(prompts[index % len(prompts)], generator=generator, **call).images
            for index, generator in enumerate(generators)
        ]
    return _tensor(np.concatenate(pictures))


@contextmanager
def _counted(pipe: Any, calls: int) -> Iterator[None]:
    """One bar over the calls of the network in all pictures, in the place of the pipeline's own, one a picture."""
    pipe.set_progress_bar_config(disable=True)
    with progress_bar("sample", total=calls, progress=None, unit="step") as bar:

        def count(*_: Any) -> None:
            bar.update(1)

        with pipe.unet.register_forward_hook(count):
            yield


def _generators(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def _tensor(images: Any) -> Tensor:
    return torch.from_numpy(np.asarray(images)).movedim(-1, 1)
