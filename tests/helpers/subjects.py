"""What the tests quantize: tiny UNets of diffusers, a small net with a bit of everything, and calls of them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

import qdiff_fx
from qdiff_fx.calibration.driver import fit_activations, fit_weights
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.graph.capture import CapturedGraph, capture
from qdiff_fx.graph.edit import shared_copy

PLAIN: dict[str, Any] = {"weight_slack": 0.0, "activation_slack": 0.0, "equalize": False}
"""Config fields that keep calibrate from deciding anything beyond the policies."""

SIZES: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}

CONTEXT = 6
"""Size of a context token."""


def unconditional_unet(**changes: Any) -> UNet2DModel:
    """4 shortcuts and 4 self-attentions."""
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    }
    return UNet2DModel(**SIZES | blocks | changes).eval()


def pipeline_folder(folder: Path) -> Path:
    """Write unet/ and scheduler/ of an unconditional pipeline, always of the same weights; returns `folder`."""
    torch.manual_seed(0)
    unconditional_unet().save_pretrained(folder / "unet")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    return folder


def conditional_unet(**changes: Any) -> UNet2DConditionModel:
    """4 shortcuts; 4 transformer blocks with self- and cross-attention."""
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": CONTEXT,
    }
    return UNet2DConditionModel(**SIZES | blocks | changes).eval()


def one_stage_unet(**changes: Any) -> UNet2DConditionModel:
    """The cheapest diffusers UNet to capture, for what concerns its inputs only."""
    stage = {
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
    }
    return conditional_unet(**stage | changes)


class Sketch(nn.Module):
    """A UNet in miniature: one of every layer kind, a shortcut and an attention. Captured in a second."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(2, channels)
        self.stem = nn.Conv2d(2, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels)
        self.wide = nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=2)
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.project = nn.Linear(channels, channels, bias=False)
        self.skip = nn.Conv2d(2 * channels, channels, 1)
        self.head = nn.Conv2d(channels, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        level = timestep[:, None] / 1000
        first = self.stem(sample)
        waves = torch.cat([torch.sin(level), torch.cos(level)], dim=1).to(sample.dtype)
        h = first + self.embed(waves)[:, :, None, None]
        h = h + self.wide(nn.functional.silu(self.norm(h)))
        low = self.down(h)
        batch, channels, height, width = low.shape
        q, k, v = self.qkv(low.reshape(batch, channels, -1)).transpose(1, 2).chunk(3, dim=2)
        attended = self.project(nn.functional.scaled_dot_product_attention(q, k, v))
        low = low + attended.transpose(1, 2).reshape(batch, channels, height, width)
        high = nn.functional.interpolate(low, scale_factor=2.0, mode="nearest")
        return self.head(nn.functional.silu(self.skip(torch.cat([high, first], dim=1))))


def sketch_inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, 8, 8), torch.linspace(1.0, 999.0, batch)


def calls_of(unet: nn.Module, *, batch: int = 4, timesteps: tuple[float, ...] = (0.0, 500.0, 999.0)) -> list[Any]:
    """(args, kwargs) of calls of a diffusers UNet or a Sketch, one for each timestep."""
    generator = torch.Generator().manual_seed(1)
    calls = []
    for timestep in timesteps:
        channels = 2 if isinstance(unet, Sketch) else 3
        args: list[Any] = [torch.randn(batch, channels, 8, 8, generator=generator), torch.full((batch,), timestep)]
        if isinstance(unet, UNet2DConditionModel):
            args.append(torch.randn(batch, 7, CONTEXT, generator=generator))
        calls.append((tuple(args), {}))
    return calls


class Preparer:
    """`qdiff_fx.prepare` that captures a module once for all tests: torch.export takes seconds."""

    def __init__(self) -> None:
        self._captured: dict[str, tuple[nn.Module, CapturedGraph]] = {}

    def __call__(self, module: nn.Module, config: Any = None, **call: Any) -> qdiff_fx.PreparedUNet:
        with patch("qdiff_fx.api.capture", self.capture):
            return qdiff_fx.prepare(module, config, **call)

    def capture(self, module: nn.Module, args: Any, kwargs: Any, **options: Any) -> CapturedGraph:
        shapes = [tuple(item.shape) for item in args]
        key = f"{id(module)} {args[0].dtype} {shapes} {options.get('sample_input')}"
        if kwargs:
            return capture(module, args, kwargs, **options)
        if key not in self._captured:
            self._captured[key] = module, capture(module, args, kwargs, **options)
        _, captured = self._captured[key]
        return CapturedGraph(
            graph_module=shared_copy(captured.graph_module), signature=captured.signature, output=captured.output
        )

    def fitted(self, module: nn.Module, preset: str = "w4a8", **changes: Any) -> qdiff_fx.PreparedUNet:
        """With every grid fixed from `calls_of`, by the fastest observers and none of calibrate's decisions."""
        observers = {"weight_observer": "minmax", "activation_observer": "minmax"}
        config = qdiff_fx.QDiffConfig.preset(preset, **(observers | changes))
        sample, timestep = sketch_inputs()
        dtype = next(module.parameters()).dtype
        call = {"example_inputs": (sample.to(dtype), timestep)} if isinstance(module, Sketch) else {}
        prepared = self(module, config, **call)
        with torch.no_grad():
            for args, kwargs in calls_of(module):
                prepared(*args, **kwargs)
        fit_activations(prepared.graph_module)
        fit_weights(prepared.graph_module)
        return prepared.set_mode(QuantizerMode.QUANTIZE)


@dataclass(frozen=True)
class ForeignNet:
    """A plain PyTorch UNet with calls of it, prepared."""

    net: nn.Module
    calls: list[Any]
    prepared: qdiff_fx.PreparedUNet


def foreign_net(kind: type[nn.Module]) -> ForeignNet:
    torch.manual_seed(0)
    net = kind().eval()
    labels = {"y": torch.tensor([0, 1, 2, 3])} if "y" in inspect.signature(net.forward).parameters else {}
    calls = [((torch.randn(4, 3, 8, 8), torch.full((4,), level)), labels) for level in (0.0, 500.0, 999.0)]
    config = qdiff_fx.QDiffConfig.preset("w4a8", **PLAIN)
    prepared = qdiff_fx.prepare(net, config, example_inputs=calls[0][0], example_kwargs=labels)
    return ForeignNet(net, calls, prepared)


def signal_to_noise(wanted: Tensor, seen: Tensor) -> float:
    """SQNR in dB."""
    wanted, seen = wanted.double(), seen.double()
    return float(10 * torch.log10(wanted.pow(2).sum() / (wanted - seen).pow(2).sum()))


def codes(*shape: int) -> Tensor:
    """Random activation codes [*shape]."""
    return torch.randint(0, 256, shape, dtype=torch.uint8)
