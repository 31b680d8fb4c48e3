"""Stable Diffusion's UNets without weights: on the meta device, prepared, converted, ready to be lowered.

Shapes are all that a performance model, a report of kernels or a trace needs; 860 M to 2.6 G parameters would take
minutes and gigabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, fx

import qdiff_fx
from qdiff_fx.fake_quantize import ActivationQuantizer, WeightQuantizer
from qdiff_fx.graph.edit import freeze_parameters, pruned
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.numerics.packing import pack_int4
from qdiff_fx.numerics.weights import fold_codes
from qdiff_fx.passes.base import PassContext, run_passes
from qdiff_fx.passes.carrier import set_carrier
from qdiff_fx.passes.convert import CONVERT

BATCH = 2


def sd15() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """Stable Diffusion 1.5: 860 M parameters, 64 x 64 latents."""
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    return unet.eval(), {"sample": torch.randn(BATCH, 4, 64, 64), "encoder_hidden_states": torch.randn(BATCH, 77, 768)}


def sdxl() -> tuple[torch.nn.Module, dict[str, Any]]:
    """Stable Diffusion XL: 2.6 G parameters, 128 x 128 latents."""
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    conditions = {"text_embeds": torch.randn(BATCH, 1280), "time_ids": torch.randn(BATCH, 6)}
    return unet.eval(), {
        "sample": torch.randn(BATCH, 4, 128, 128),
        "encoder_hidden_states": torch.randn(BATCH, 77, 2048),
        "added_cond_kwargs": conditions,
    }


def tiny() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """The same kind of network at a size that an interpreter runs in seconds."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=8,
    )
    return unet.eval(), {"sample": torch.randn(BATCH, 4, 8, 8), "encoder_hidden_states": torch.randn(BATCH, 7, 8)}


def tiny_xl() -> tuple[torch.nn.Module, dict[str, Any]]:
    """SDXL's kind of network and its conditions, at that size."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
        cross_attention_dim=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )
    conditions = {"text_embeds": torch.randn(BATCH, 8), "time_ids": torch.randn(BATCH, 6)}
    return unet.eval(), {
        "sample": torch.randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": torch.randn(BATCH, 7, 8),
        "added_cond_kwargs": conditions,
    }


ARCHITECTURES: Mapping[str, Callable[[], tuple[torch.nn.Module, dict[str, Any]]]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "tiny": tiny,
    "tiny-xl": tiny_xl,
}


def abstract_plan(name: str, preset: str, dtype: torch.dtype = torch.float16) -> tuple[fx.GraphModule, CallSignature]:
    """The plan of an architecture on the meta device: shapes and dtypes are those of a real one, grids mean nothing."""
    with torch.device("meta"):
        unet, inputs = ARCHITECTURES[name]()
    config = qdiff_fx.QDiffConfig.preset(
        preset, weight_slack=0.0, activation_slack=0.0, equalize=False, weight_observer="minmax"
    )
    prepared = qdiff_fx.prepare(
        unet, config, example_kwargs={**inputs, "timestep": torch.full((BATCH,), 500.0, device="meta")}
    )
    graph_module = prepared.graph_module
    for module in graph_module.modules():
        if isinstance(module, WeightQuantizer):
            module.to("meta")
        elif isinstance(module, ActivationQuantizer):
            module.calibrated = True
    # Values of a meta tensor cannot be checked.
    where = "qdiff_fx.passes.convert.layers"
    with (
        patch(f"{where}.fold_codes", partial(fold_codes, validate=False)),
        patch(f"{where}.pack_int4", partial(pack_int4, validate=False)),
    ):
        run_passes(CONVERT, graph_module, PassContext(config=config, signature=prepared.signature))
    plan = pruned(graph_module).to("meta")
    freeze_parameters(plan)
    return plan, set_carrier(plan, prepared.signature, dtype)
