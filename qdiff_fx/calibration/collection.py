"""The arguments of a collection, checked, and what they say about its data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qdiff_fx.calibration.conditions import Conditions, gather_conditions
from qdiff_fx.calibration.prompts import conditions_of_prompts
from qdiff_fx.calibration.provenance import describe, refuse_quantized, weights_fingerprint
from qdiff_fx.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Collection:
    """All that decides what is collected.

    Args:
      unet: full precision.
      scheduler: a diffusers scheduler; copied, never changed.
      conditions: of both branches.
      sample_shape: (C, H, W).
      num_inference_steps, num_timesteps, samples_per_timestep, guidance_scale, strategy, batch_size, seed: see
        CalibrationSet.collect.
    """

    unet: nn.Module
    scheduler: Any
    conditions: Conditions
    sample_shape: tuple[int, ...]
    num_inference_steps: int
    num_timesteps: int
    samples_per_timestep: int
    guidance_scale: float
    strategy: str
    batch_size: int
    seed: int

    def metadata(self) -> dict[str, Any]:
        """What is told about the data: plain JSON, the same for the same arguments."""
        return {
            "source": "collect",
            "scheduler": describe(self.scheduler),
            "model": describe(self.unet),
            "sample_shape": list(self.sample_shape),
            "num_inference_steps": self.num_inference_steps,
            "num_timesteps": self.num_timesteps,
            "samples_per_timestep": self.samples_per_timestep,
            "guidance_scale": float(self.guidance_scale),
            "strategy": self.strategy,
            "seed": self.seed,
        }

    def request(self) -> dict[str, Any]:
        """What must be equal for a collection to go on in a folder where one began."""
        return self.metadata() | {
            "batch_size": self.batch_size,
            "conditions": self.conditions.digest(),
            "weights": weights_fingerprint(self.unet),
        }


def make_collection(
    pipe_or_unet: Any,
    *,
    scheduler: Any,
    num_inference_steps: int,
    num_timesteps: int,
    samples_per_timestep: int,
    guidance_scale: float,
    strategy: str,
    encoder_hidden_states: torch.Tensor | None,
    negative_encoder_hidden_states: torch.Tensor | None,
    conditions: Mapping[str, Any] | None,
    negative_conditions: Mapping[str, Any] | None,
    prompts: Sequence[str] | None,
    sample_shape: Sequence[int] | None,
    batch_size: int,
    seed: int,
    progress: bool | None = False,
) -> Collection:
    """The collection that these arguments of `CalibrationSet.collect` ask for. Raises InputError with the remedy."""
    unet = getattr(pipe_or_unet, "unet", None)
    unet = pipe_or_unet if unet is None else unet
    if not isinstance(unet, nn.Module):
        raise InputError(f"collect got a {type(unet).__name__}; want a UNet and scheduler=, or a pipeline with .unet")
    refuse_quantized(unet)
    scheduler = scheduler if scheduler is not None else getattr(pipe_or_unet, "scheduler", None)
    if not all(hasattr(scheduler, name) for name in ("from_config", "set_timesteps", "step", "scale_model_input")):
        raise InputError(f"scheduler={type(scheduler).__name__}: {type(unet).__name__} needs scheduler= of diffusers")
    counts = {"samples_per_timestep": samples_per_timestep, "batch_size": batch_size}
    for name, count in (counts | {"num_inference_steps": num_inference_steps}).items():
        if count < 1:
            raise InputError(f"{name}={count}: want 1 or more")
    if not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale={guidance_scale}: want a finite number, 1 for none")
    gathered: Conditions
    if prompts is not None:
        given = (encoder_hidden_states, negative_encoder_hidden_states, conditions, negative_conditions)
        if any(item is not None for item in given):
            raise InputError("prompts= and encoder_hidden_states= or conditions= exclude each other; pass one of them")
        gathered, seen = conditions_of_prompts(
            pipe_or_unet,
            prompts,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            sample_shape=sample_shape,
            progress=progress,
        )
        sample_shape = seen if sample_shape is None else sample_shape
    else:
        gathered = gather_conditions(
            guidance_scale=guidance_scale,
            encoder_hidden_states=encoder_hidden_states,
            negative_encoder_hidden_states=negative_encoder_hidden_states,
            conditions=conditions,
            negative_conditions=negative_conditions,
            context_size=_context_size(unet),
        )
    return Collection(
        unet=unet,
        scheduler=scheduler,
        conditions=gathered,
        sample_shape=_sample_shape(unet, sample_shape),
        num_inference_steps=num_inference_steps,
        num_timesteps=num_timesteps,
        samples_per_timestep=samples_per_timestep,
        guidance_scale=guidance_scale,
        strategy=strategy,
        batch_size=batch_size,
        seed=seed,
    )


def _sample_shape(unet: nn.Module, asked: Sequence[int] | None) -> tuple[int, ...]:
    config = getattr(unet, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if asked is None:
        if channels is None or size is None:
            raise InputError(
                f"{type(unet).__name__} has no config with in_channels and sample_size; pass sample_shape="
            )
        asked = (channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
    if len(asked) != 3 or min(asked) < 1 or channels not in (None, asked[0]):
        wanted = "C" if channels is None else str(channels)
        raise InputError(f"sample_shape={tuple(asked)}: the model wants ({wanted}, H, W), without the batch dimension")
    return tuple(asked)


def _context_size(unet: nn.Module) -> int | None:
    config = getattr(unet, "config", None)
    size = getattr(config, "cross_attention_dim", None)
    return size if isinstance(size, int) and getattr(config, "encoder_hid_dim_type", None) is None else None
