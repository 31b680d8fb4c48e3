"""Tiny full-precision models and the four schedulers that calibration data must work with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)

_SIZES: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let diffusers 0.42 and torch 2.13 disagree with NumPy 2 about `__array__` in two of the schedulers."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"))


@pytest.fixture
def unet() -> UNet2DModel:
    return UNet2DModel(**_SIZES).eval()


@pytest.fixture
def conditional_unet() -> UNet2DConditionModel:
    crossed = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**_SIZES | crossed, cross_attention_dim=6, attention_head_dim=4).eval()


@pytest.fixture(params=["DDIM", "PNDM", "PLMS", "DPM-Solver++", "Euler"])
def scheduler(request: pytest.FixtureRequest) -> Any:
    return {
        "DDIM": lambda: DDIMScheduler(clip_sample=False),
        "PNDM": lambda: PNDMScheduler(),
        "PLMS": lambda: PNDMScheduler(skip_prk_steps=True),
        "DPM-Solver++": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++"),
        "Euler": lambda: EulerDiscreteScheduler(),
    }[request.param]()
