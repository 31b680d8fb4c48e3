"""Outlier channels planted into a trained UNet without changing its function: what a quantizer must cope with.

All planters change a diffusers UNet in place. They suit the bundled models: streams of 32 channels at full resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.cli.sources import Source

WIDTH, STREAM = 32, range(2, 8)
"""Streams of so many channels are planted, in these channels: they are closed under the groups of every GroupNorm that
reads them, cats included (groups of 1, 2 and 3 channels)."""

HEAD_CHANNELS = (1, 6)
"""Of attention projections and GEGLU."""


@torch.no_grad()
def plant_residual(unet: Any, ratio: float) -> None:
    """Channels of the full-resolution streams `ratio` times larger.

    Every writer is scaled (identity adds carry the factor on), every reader but GroupNorms unscaled.
    """
    _rows(unet.conv_in, STREAM, ratio)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and module.out_channels == WIDTH:
            _rows(module.conv2, STREAM, ratio)
            if module.conv_shortcut is not None:
                _rows(module.conv_shortcut, STREAM, ratio)
        elif isinstance(module, Downsample2D) and module.channels == WIDTH:
            _columns(module.conv, STREAM, 1.0 / ratio)
            _rows(module.conv, STREAM, ratio)
    for block in unet.down_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None and resnet.in_channels == WIDTH:
                _columns(resnet.conv_shortcut, STREAM, 1.0 / ratio)
    deep = unet.mid_block.resnets[-1].out_channels
    for block in unet.up_blocks:
        for resnet in block.resnets:
            offsets = {0: deep, deep: resnet.in_channels - deep}
            planted = [start + channel for start, width in offsets.items() if width == WIDTH for channel in STREAM]
            _columns(resnet.conv_shortcut, planted, 1.0 / ratio)
            deep = resnet.out_channels


@torch.no_grad()
def plant_value(unet: nn.Module, ratio: float) -> None:
    """Rows of v scaled, columns of the output projection unscaled."""
    for module in unet.modules():
        if isinstance(module, Attention):
            _rows(module.to_v, HEAD_CHANNELS, ratio)
            _columns(module.to_out[0], HEAD_CHANNELS, 1.0 / ratio)


@torch.no_grad()
def plant_query(unet: nn.Module, ratio: float) -> None:
    """Rows of q scaled, rows of k unscaled."""
    for module in unet.modules():
        if isinstance(module, Attention):
            _rows(module.to_q, HEAD_CHANNELS, ratio)
            _rows(module.to_k, HEAD_CHANNELS, 1.0 / ratio)


@torch.no_grad()
def plant_geglu(unet: nn.Module, ratio: float) -> None:
    """Rows of GEGLU's value half scaled, columns of the linear behind it unscaled."""
    for module in unet.modules():
        if isinstance(module, FeedForward) and isinstance(module.net[0], GEGLU):
            _rows(module.net[0].proj, HEAD_CHANNELS, ratio)  # chunk(2): the value half comes first
            _columns(module.net[2], HEAD_CHANNELS, 1.0 / ratio)


@torch.no_grad()
def plant_constant(unet: Any, ratio: float, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A constant of `ratio` standard deviations added to channels of the last up block's streams.

    No factor can undo it. GroupNorm takes it away (it is constant over every group that reads it), the 1x1 skip
    convolution behind takes it back in its bias; no padded convolution reads these streams.

    Args:
      args, kwargs: a call of the network, to measure the streams' standard deviation.
    """
    resnets = list(unet.up_blocks[-1].resnets)
    deviations: list[float] = []

    def measure(module: nn.Module, inputs: Any, output: Tensor) -> None:
        deviations.append(float(output.std()))

    handles = [resnet.register_forward_hook(measure) for resnet in resnets]
    try:
        unet(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for resnet, reader, deviation in zip(resnets, [*resnets[1:], None], deviations, strict=True):
        constant = ratio * deviation
        resnet.conv2.bias[list(STREAM)] += constant
        if reader is not None:  # its deep part comes first in the cat
            weight = reader.conv_shortcut.weight
            reader.conv_shortcut.bias -= constant * weight[:, list(STREAM)].sum(dim=(1, 2, 3))


PLANTED: Mapping[str, Callable[[nn.Module, float], None]] = {
    "residual stream": plant_residual,
    "v": plant_value,
    "q against k": plant_query,
    "GEGLU": plant_geglu,
}
"""Planters of outliers that factors can undo."""

CONSTANT, CONSTANT_RATIO = "constant", 100


def plant(unet: nn.Module, planted: str, ratio: float, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Plant `planted`, a key of PLANTED or CONSTANT; anything else ("none") leaves `unet` as it is.

    Args:
      args, kwargs: a call of the network, see `plant_constant`.
    """
    if planted == CONSTANT:
        plant_constant(unet, float(ratio), args, kwargs)
    elif planted in PLANTED:
        PLANTED[planted](unet, float(ratio))


def samples(
    source: Source, guidance_scale: float, folder: Path, samples_per_timestep: int = 16
) -> tuple[CalibrationSet, CalibrationSet]:
    """(calibration rows, 160 held-out rows) of 10 timesteps of DDIM-50 trajectories, other noise, kept in `folder`."""
    fit, held = (
        source.collect(
            guidance_scale=guidance_scale,
            num_inference_steps=50,
            num_timesteps=10,
            samples_per_timestep=count,
            seed=seed,
            path=folder / f"{source.name}-{name}",
            progress=False,
        )
        for seed, (name, count) in enumerate({"fit": samples_per_timestep, "held": 16}.items())
    )
    return fit, held


def _rows(layer: Any, channels: Iterable[int], factor: float) -> None:
    layer.weight[list(channels)] *= factor
    if layer.bias is not None:
        layer.bias[list(channels)] *= factor


def _columns(layer: Any, channels: Iterable[int], factor: float) -> None:
    layer.weight[:, list(channels)] *= factor
