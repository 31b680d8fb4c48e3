"""Wrappers around forward that move parts of a pipeline to their device, as CPU offload puts them there."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qdiff_fx
from pipelines import stable_diffusion
from subjects import PLAIN

QUICK: dict[str, Any] = {**PLAIN, "weight_observer": "minmax", "activation_observer": "minmax"}


def _offloaded(module: nn.Module, calls: list[str]) -> None:
    """Replace the instance's forward by one that moves the module to its device before and away after the call."""
    forward = module.forward

    def moving(*args: Any, **kwargs: Any) -> Any:
        module.to("cpu")
        calls.append(type(module).__name__)
        result = forward(*args, **kwargs)
        module.to("cpu")
        return result

    module.forward = functools.update_wrapper(moving, forward)  # type: ignore[method-assign]


def test_offloading_hooks_on_the_original_and_on_the_quantized_network(tmp_path: Path) -> None:
    pipe: Any = stable_diffusion(tmp_path)
    calls: list[str] = []
    _offloaded(pipe.unet, calls)
    call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}
    wanted = pipe("a boot", generator=torch.Generator().manual_seed(0), **call).images
    with qdiff_fx.CalibrationSet.record(pipe.unet, samples_per_timestep=4) as recording:
        pipe("a red", **call)
    prepared = qdiff_fx.prepare(pipe.unet, qdiff_fx.QDiffConfig.preset("w8a8", **QUICK))
    qdiff_fx.calibrate(prepared, recording.dataset, progress=False)
    pipe.unet = qdiff_fx.convert(prepared, backend="reference")
    _offloaded(pipe.unet, calls)
    seen = pipe("a boot", generator=torch.Generator().manual_seed(0), **call).images
    assert calls.count("QuantizedUNet") == 2 and calls.count("UNet2DConditionModel") >= 4
    assert 0 < abs(seen - wanted).mean() < 0.02
