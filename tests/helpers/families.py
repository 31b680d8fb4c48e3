"""The UNets that people use, from their public configs with random weights: at real size, and scaled down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

import qdiff_fx
from adapters import picture, with_fused_lora, with_ip_adapter
from qdiff_fx.examples import example_call
from qdiff_fx.graph.capture import CapturedGraph, capture
from qdiff_fx.graph.edit import shared_copy
from qdiff_fx.graph.meta import ATTENTION, SPLIT_PART
from subjects import PLAIN

Call = tuple[tuple[Any, ...], dict[str, Any]]

FAST = qdiff_fx.QDiffConfig.preset("w4a8", weight_observer="minmax", activation_observer="minmax", **PLAIN)
"""No search and no decisions: what is tested here is structure."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture.

    Args:
      build: the model with random weights.
      shortcuts: channels of the operands of every cat that is split, in execution order.
      attentions: scaled dot products.
      example: extra keyword inputs of a call, from the model and its example call; None if it has none.
    """

    build: Callable[[], nn.Module]
    shortcuts: tuple[tuple[int, ...], ...]
    attentions: int
    example: Callable[[nn.Module, Call], dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class FamilyRun:
    """A family's model through the whole chain."""

    family: Family
    model: nn.Module
    calls: list[Call]
    captured: CapturedGraph
    prepared: qdiff_fx.PreparedUNet
    report: Any
    quantized: qdiff_fx.QuantizedUNet
    folder: Path = field(default_factory=Path)


def run_family(family: Family, folder: Path, *, dtype: torch.dtype = torch.float32, release: bool = False) -> FamilyRun:
    """Capture, prepare, calibrate on a few samples, convert, save."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = family.build().to(dtype).eval()
    args, kwargs = example_call(model)
    extra = family.example(model, (args, kwargs)) if family.example else {}
    call = args, {**kwargs, **extra}
    captured = capture(model, *call, forced={"return_dict": False})
    copy = CapturedGraph(
        graph_module=shared_copy(captured.graph_module), signature=captured.signature, output=captured.output
    )
    with patch("qdiff_fx.api.capture", lambda *_args, **_kwargs: copy):
        prepared = qdiff_fx.prepare(model, FAST, example_inputs=call[0], example_kwargs=call[1])
    calls = [fill(call, level, seed) for seed, level in enumerate((0.0, 300.0, 600.0, 999.0))]
    report = qdiff_fx.calibrate(prepared, calls, progress=False)
    quantized = qdiff_fx.convert(prepared, backend="reference", release=release)
    qdiff_fx.save(quantized, folder)
    return FamilyRun(
        family=family,
        model=model,
        calls=calls,
        captured=captured,
        prepared=prepared,
        report=report,
        quantized=quantized,
        folder=folder,
    )


def fill(call: Call, level: float, seed: int, *, batch: int | None = None, height: int = 0, width: int = 0) -> Call:
    """The call with random values at a noise level, in another batch, height or width if asked."""
    generator = torch.Generator().manual_seed(seed)
    sample: Tensor = call[0][0]
    count, size = batch or sample.shape[0], sample.shape[2]

    def value(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: value(inner) for key, inner in item.items()}
        if isinstance(item, (list, tuple)):
            return type(item)(value(inner) for inner in item)
        if not isinstance(item, Tensor):
            return item
        shape = [count, *item.shape[1:]]
        if item.dim() == 4:
            # Every map of a call shrinks with the sample; ControlNet's picture is larger by a whole factor.
            shape[2] = shape[2] * (height or size) // size
            shape[3] = shape[3] * (width or size) // size
        if not item.is_floating_point():
            return torch.randint(0, 3, shape, generator=generator).to(item.dtype)
        if item.dim() == 1:
            return torch.full(shape, level)
        return torch.randn(shape, generator=generator).to(item.dtype)

    args, kwargs = value(call[0]), value(call[1])
    return args, kwargs


def shortcuts(graph_module: torch.fx.GraphModule) -> tuple[tuple[int, ...], ...]:
    """Channels of the operands of every shortcut that was split."""
    found: dict[str, list[int]] = {}
    for node in graph_module.graph.nodes:
        if part := SPLIT_PART.get(node):
            sizes = found.setdefault(part.cat, [])
            if part.index == len(sizes):
                sizes.append(part.stop - part.start)
    return tuple(tuple(sizes) for sizes in found.values())


def attentions(graph_module: torch.fx.GraphModule) -> int:
    """How many attentions were annotated."""
    return sum(ATTENTION.get(node) is not None for node in graph_module.graph.nodes)


# ------------------------------------------------------------------------------------- scaled down

_TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
_TINY_CROSS: dict[str, Any] = _TINY | {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
_ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
_ONE_LATENT_LEVEL: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("AttnUpBlock2D",),
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 4,
}
_DDPM_TYPES: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "in_channels": 3,
    "out_channels": 3,
}
_DDPM_STYLE: dict[str, Any] = {
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
_FOUR = ((16, 16), (16, 8), (16, 8), (8, 8))
_TWO = ((8, 8), (8, 8))


def residuals(model: nn.Module, call: Call) -> dict[str, Any]:
    """What a ControlNet hands to a UNet: one map a skip connection, and one for the middle."""
    sample: Tensor = call[0][0]
    config: Any = model.config
    widths, layers = config.block_out_channels, config.layers_per_block
    shapes, side = [(widths[0], sample.shape[2])], sample.shape[2]
    for level, width in enumerate(widths):
        shapes += [(width, side)] * layers
        if level < len(widths) - 1:
            side //= 2
            shapes.append((width, side))
    maps = tuple(sample.new_zeros(len(sample), width, side, side) for width, side in shapes)
    return {"down_block_additional_residuals": maps, "mid_block_additional_residual": torch.zeros_like(maps[-1])}


def controlnet(**config: Any) -> ControlNetModel:
    """A ControlNet for a UNet of this config; its zero convolutions are given values, as after training."""
    names = ("block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim", "attention_head_dim")
    wanted = {key: config[key] for key in (*names, "down_block_types")}
    net = ControlNetModel(**wanted, conditioning_embedding_out_channels=(4, 8, 8, 8))
    for name, parameter in net.named_parameters():
        if parameter.abs().max() == 0 and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.1)
    return net


SMALL: dict[str, Family] = {
    "ddpm": Family(
        build=lambda: UNet2DModel(**_TINY | _DDPM_TYPES | _DDPM_STYLE),
        shortcuts=_FOUR,
        attentions=4,
    ),
    "latent-diffusion": Family(build=lambda: UNet2DModel(**_TINY | _ONE_LATENT_LEVEL), shortcuts=_TWO, attentions=4),
    "latent-diffusion-church": Family(
        build=lambda: UNet2DModel(
            **_TINY
            | _DDPM_TYPES
            | {
                "in_channels": 4,
                "out_channels": 4,
                "attention_head_dim": 4,
                "resnet_time_scale_shift": "scale_shift",
                "downsample_type": "resnet",
                "upsample_type": "resnet",
            }
        ),
        shortcuts=_FOUR,
        attentions=4,
    ),
    "class-conditional": Family(
        build=lambda: UNet2DModel(
            **_TINY | _ONE_LATENT_LEVEL | {"num_class_embeds": 3, "resnet_time_scale_shift": "scale_shift"}
        ),
        shortcuts=_TWO,
        attentions=4,
    ),
    "sd-1": Family(build=lambda: UNet2DConditionModel(**_TINY_CROSS), shortcuts=_FOUR, attentions=8),
    "sd-2": Family(
        build=lambda: UNet2DConditionModel(
            **_TINY_CROSS | _ONE_LEVEL | {"use_linear_projection": True, "attention_head_dim": (4,)}
        ),
        shortcuts=_TWO,
        attentions=8,
    ),
    "inpainting": Family(
        build=lambda: UNet2DConditionModel(**_TINY_CROSS | _ONE_LEVEL | {"in_channels": 9}),
        shortcuts=_TWO,
        attentions=8,
    ),
    "sdxl": Family(
        build=lambda: UNet2DConditionModel(
            **_TINY_CROSS
            | {
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "cross_attention_dim": 16,
                "attention_head_dim": (2, 4),
                "use_linear_projection": True,
                "mid_block_type": None,
                "transformer_layers_per_block": (1, 2),
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 32,
            }
        ),
        shortcuts=_FOUR,
        attentions=12,
    ),
    "controlled": Family(
        build=lambda: UNet2DConditionModel(**_TINY_CROSS | _ONE_LEVEL),
        shortcuts=_TWO,
        attentions=8,
        example=residuals,
    ),
    "ip-adapter": Family(
        build=lambda: with_ip_adapter(**_TINY_CROSS | _ONE_LEVEL),
        shortcuts=_TWO,
        attentions=12,  # the picture's, beside each of four cross-attentions
        example=picture,
    ),
    "lora": Family(build=lambda: with_fused_lora(**_TINY_CROSS | _ONE_LEVEL), shortcuts=_TWO, attentions=8),
    "controlnet": Family(build=lambda: controlnet(**_TINY_CROSS | _ONE_LEVEL), shortcuts=(), attentions=4),
}
