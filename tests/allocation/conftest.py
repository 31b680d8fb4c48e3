"""A tiny UNet, its calibration data, and a calibrated W4A8 model of uniform bits."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

import qdiff_fx
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.model import PreparedUNet

UNIFORM = {"weight_slack": 0.0, "activation_slack": 0.0, "equalize": False}


@pytest.fixture(scope="package")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()


@pytest.fixture(scope="package")
def data(unet: UNet2DModel) -> CalibrationSet:
    return CalibrationSet.collect(
        unet, scheduler=DDIMScheduler(), num_inference_steps=8, num_timesteps=4, samples_per_timestep=12, progress=False
    )


@pytest.fixture(scope="package")
def calibrated(unet: UNet2DModel, data: CalibrationSet) -> PreparedUNet:
    prepared = qdiff_fx.prepare(unet, qdiff_fx.QDiffConfig.preset("w4a8", **UNIFORM))
    qdiff_fx.calibrate(prepared, data)
    return prepared


@pytest.fixture
def prepared(calibrated: PreparedUNet) -> PreparedUNet:
    return copy.deepcopy(calibrated)
