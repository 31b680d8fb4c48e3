"""A pipeline-like sampler for the bundled class-conditional model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdiff_fx.assets.sampling import denoise, guided_prediction
from qdiff_fx.errors import InputError

NUM_CLASSES = 10
"""Rows 0..9 of the context are the classes; row 10 is the empty prompt."""


@dataclass(kw_only=True)
class ConditionalPipeline:
    """Samples images of asked classes with classifier-free guidance.

    Like a diffusers pipeline, it may be given another network by assignment: `pipeline.unet = quantized`.

    Args:
      unet: a UNet2DConditionModel, or what stands in for one and has its `config`.
      scheduler: of diffusers; never changed by a call.
      context: [11, T, D]; rows 0..9 stand for the classes, row 10 is the empty prompt.
    """

    unet: Any
    scheduler: Any
    context: Tensor

    def class_context(self, labels: Sequence[int] | Tensor) -> Tensor:
        """[B, T, D], the context rows of `labels`. Raises InputError on a label outside 0..10."""
        rows = torch.as_tensor(labels)
        if rows.dim() != 1 or rows.numel() == 0 or rows.is_floating_point():
            raise InputError(f"labels of shape {list(rows.shape)} and dtype {rows.dtype}: want a list of integers")
        if int(rows.min()) < 0 or int(rows.max()) > NUM_CLASSES:
            raise InputError(f"labels {rows.tolist()}: want 0..9, or 10 for the empty prompt")
        return self.context[rows.to(self.context.device)]

    @torch.no_grad()
    def __call__(
        self,
        labels: Sequence[int] | Tensor,
        *,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        unet: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Images of the asked classes, [B, 1, 28, 28] in [-1, 1].

        Args:
          labels: B of 0..9 (10: the empty prompt).
          guidance_scale: see `guided_prediction`.
          num_inference_steps: steps of the sampler, 1..1000.
          generator: source of the starting noise, which is drawn on the generator's device.
          latents: [B, 1, 28, 28], starting noise to use instead of drawing it.
          unet: used instead of `self.unet` in this call alone.

        Raises: InputError if labels or latents do not fit.
        """
        network = self.unet if unet is None else unet
        context = self.class_context(labels)
        empty_context = self.context[NUM_CLASSES:].expand_as(context)
        size = self.unet.config.sample_size
        shape = (len(context), self.unet.config.in_channels, size, size)
        if latents is None:
            device = None if generator is None else generator.device
            latents = torch.randn(shape, generator=generator, device=device, dtype=context.dtype)
        elif latents.shape != shape:
            raise InputError(f"latents of shape {list(latents.shape)}: want {list(shape)} for {len(context)} labels")
        starting_noise = latents.to(context.device)

        def predict(sample: Tensor, timestep: Tensor) -> Tensor:
            return guided_prediction(network, sample, timestep, context, empty_context, guidance_scale)

        for sample in denoise(predict, self.scheduler, starting_noise, num_inference_steps):
            images = sample
        return images.clamp(-1, 1)
