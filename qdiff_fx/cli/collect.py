"""`qdiff-fx collect`: calibration data on disk."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from qdiff_fx.calibration.timesteps import STRATEGIES
from qdiff_fx.cli.parser import OneLineParser, add_json_argument, future_folder, positive, verb_parser
from qdiff_fx.cli.pipelines import add_prompt_arguments, open_model
from qdiff_fx.cli.sources import add_source_arguments, require_full_precision


def add_collect_arguments(parser: OneLineParser) -> None:
    """How much to collect, and where on the trajectory."""
    parser.add_argument("--steps", type=positive, default=100, help="sampling steps of a trajectory (100)")
    parser.add_argument("--timesteps", type=positive, default=20, help="steps that are kept (20)")
    parser.add_argument("--samples", type=positive, default=64, help="inputs kept at each of them (64)")
    parser.add_argument("--batch-size", type=positive, default=32, help="trajectories run at a time (32)")
    parser.add_argument("--strategy", choices=tuple(STRATEGIES), default="uniform", help="which steps (uniform)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")


def parser() -> OneLineParser:
    """Arguments of this verb."""
    result = verb_parser(
        "collect",
        "Run the full-precision model in its own sampler and keep what its network is given, at evenly spaced steps.",
        "qdiff-fx collect fashion-uncond --out calibration --samples 64",
    )
    result.add_argument("model", metavar="DIR", help="a diffusers folder, or fashion-uncond, fashion-cond")
    result.add_argument("--out", type=Path, required=True, metavar="SET", help="folder; an unfinished set goes on")
    add_collect_arguments(result)
    add_source_arguments(result)
    add_prompt_arguments(result)
    add_json_argument(result)
    return result


def run(arguments: Namespace) -> None:
    """Collect, and say what came."""
    future_folder(arguments.out)
    source = require_full_precision(open_model(arguments))
    data = source.collect(
        guidance_scale=arguments.guidance,
        num_inference_steps=arguments.steps,
        num_timesteps=arguments.timesteps,
        samples_per_timestep=arguments.samples,
        batch_size=arguments.batch_size,
        strategy=arguments.strategy,
        seed=arguments.seed,
        path=arguments.out,
    )
    if arguments.json:
        counts = {"inputs": len(data), "timesteps": list(data.timesteps)}
        print(json.dumps({"out": str(arguments.out), **counts, "fingerprint": data.fingerprint}, indent=1))
        return
    print(f"{arguments.out}: {len(data)} inputs at {len(data.timesteps)} timesteps, {data.fingerprint[:12]}")
