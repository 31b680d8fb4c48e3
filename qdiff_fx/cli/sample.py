"""`qdiff-fx sample`: pictures from a model or a quantized folder."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.cli.parser import OneLineParser, add_json_argument, future_file, positive, verb_parser
from qdiff_fx.cli.pictures import pipeline_pictures
from qdiff_fx.cli.pipelines import add_prompt_arguments, is_pipeline, read_prompts
from qdiff_fx.cli.sources import add_source_arguments, open_source
from qdiff_fx.errors import InputError
from qdiff_fx.report.pictures import save_grid

_LARGE = 128
"""Pixels a side from which on a picture is shown as it is."""


def parser() -> OneLineParser:
    """Arguments of this verb."""
    result = verb_parser(
        "sample",
        "Sample pictures. Equal seeds start from equal noise, whatever the model: compare them side by side.",
        "qdiff-fx sample unet-w4a8 --out picture.png --samples 16 --seed 0",
    )
    result.add_argument("model", metavar="MODEL", help="a quantized folder, a diffusers folder, or a bundled model")
    result.add_argument("--out", type=Path, required=True, metavar="PNG", help="the picture")
    result.add_argument("--samples", type=positive, help="pictures (one a prompt; 16 without prompts)")
    result.add_argument("--steps", type=positive, default=50, help="sampling steps (50)")
    result.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    result.add_argument("--backend", default="auto", help="kernels of a quantized model (auto)")
    add_source_arguments(result)
    add_prompt_arguments(result)
    add_json_argument(result)
    return result


def run(arguments: Namespace) -> None:
    """Sample and write the picture."""
    future_file(arguments.out, ".png")
    if is_pipeline(arguments.model):
        pictures = pipeline_pictures(arguments)
        save_grid(arguments.out, pictures, columns=8, zoom=1 if pictures.shape[-1] >= _LARGE else 4)
        _tell(arguments, len(pictures), arguments.model)
        return
    if read_prompts(arguments):
        raise InputError(f"{arguments.model}: prompts need the folder of a whole pipeline, with its text encoder")
    samples = arguments.samples or 16
    source = open_source(arguments.model, context=arguments.context, backend=arguments.backend)
    if source.sample_shape[0] not in (1, 3):
        raise InputError(
            f"{source.name}: denoises {source.sample_shape[0]} channels, latents and no pictures; "
            f"put the network into its diffusers pipeline: pipe.unet = qdiff_fx.load(...)"
        )
    noise = source.noise(samples, arguments.seed)
    sampler = source.sampler(noise, steps=arguments.steps, guidance_scale=arguments.guidance)
    with progress_bar("sample", total=arguments.steps, progress=None) as bar:

        def network(*args: object, **kwargs: object) -> object:
            bar.update(1)
            return source.unet(*args, **kwargs)

        images = sampler(network).images
    save_grid(arguments.out, (images + 1) / 2, columns=8)
    _tell(arguments, samples, source.name)


def _tell(arguments: Namespace, samples: int, name: str) -> None:
    if arguments.json:
        seeds = {"steps": arguments.steps, "seed": arguments.seed}
        print(json.dumps({"out": str(arguments.out), "model": name, "samples": samples, **seeds}, indent=1))
        return
    print(f"{arguments.out}: {samples} samples of {name}, {arguments.steps} steps")
