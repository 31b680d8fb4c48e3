"""The bundled models load offline, in fp32, and are what the model card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file

from qdiff_fx.assets import (
    CLASS_NAMES,
    conditional_path,
    load_conditional,
    load_unconditional,
    unconditional_path,
)

MEGABYTE = 1_000_000


@pytest.mark.parametrize("path", [unconditional_path(), conditional_path()], ids=["unconditional", "conditional"])
def test_stored_weights_are_fp16_and_under_nine_megabytes(path: Path) -> None:
    weights = load_file(path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 9 * MEGABYTE


@pytest.mark.parametrize("path", [unconditional_path(), conditional_path()], ids=["unconditional", "conditional"])
def test_scheduler_config_travels_with_the_model_and_predicts_velocity(path: Path) -> None:
    config = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"
    assert config["clip_sample"] is False


def test_loaded_networks_are_fp32_in_eval_mode_with_the_stored_values() -> None:
    for unet, path in (
        (load_unconditional().unet, unconditional_path()),
        (load_conditional().unet, conditional_path()),
    ):
        stored = load_file(path / "unet" / "diffusion_pytorch_model.safetensors")
        state = unet.state_dict()
        assert not unet.training
        assert state.keys() == stored.keys()
        assert all(state[name].dtype == torch.float32 for name in stored)
        assert all(torch.equal(state[name], stored[name].float()) for name in stored)


def test_the_unconditional_folder_is_a_diffusers_pipeline_folder() -> None:
    pipeline = DDIMPipeline.from_pretrained(unconditional_path(), local_files_only=True, low_cpu_mem_usage=False)
    bundled = load_unconditional()
    assert pipeline.scheduler.config == bundled.scheduler.config
    sample = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = bundled.unet(sample, 500, return_dict=False)[0]
        torch.testing.assert_close(pipeline.unet.float()(sample, 500, return_dict=False)[0], expected, rtol=0, atol=0)


def test_the_loaders_share_no_state() -> None:
    first, second = load_unconditional(), load_unconditional()
    torch.nn.init.zeros_(first.unet.conv_in.weight)
    assert second.unet.conv_in.weight.abs().max() > 0


def test_there_is_a_name_for_each_class() -> None:
    assert len(set(CLASS_NAMES)) == 10
    assert load_conditional().context.shape == (11, 4, 64)
