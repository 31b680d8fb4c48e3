"""Pipelines that hold a quantized network: cast, mapped to a device, offloaded between calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

import qdiff_fx
from families import FamilyRun
from pipelines import stable_parts
from qdiff_fx.errors import BackendError, InputError, QDiffWarning

Chain = Callable[[str], FamilyRun]


@pytest.fixture(scope="module")
def folder(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with a quantized network in its unet/."""
    folder = tmp_path_factory.mktemp("placement")
    unet = qdiff_fx.load(chain("sd-2").folder, backend="reference")
    StableDiffusionPipeline(unet=unet, **stable_parts(folder / "parts")).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def _load(folder: Path, **options: Any) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return _load(folder)


@pytest.fixture(scope="module")
def wanted(pipe: Any) -> np.ndarray:
    return _images(pipe)


def _images(pipe: Any) -> np.ndarray:
    call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}
    images: np.ndarray = pipe("a boot", generator=torch.Generator().manual_seed(0), **call).images
    return images


def _dtypes(pipe: Any) -> dict[str, torch.dtype]:
    return {name: getattr(pipe, name).dtype for name in ("unet", "vae", "text_encoder")}


def test_a_move_and_the_carriers_own_type_change_nothing(pipe: Any, wanted: np.ndarray) -> None:
    for moved in (pipe.to("cpu"), pipe.to(torch.float32), pipe.to("cpu", torch.float32)):
        assert moved is pipe and np.array_equal(_images(pipe), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_of_the_pipeline_casts_the_other_parts(
    chain: Chain, folder: Path, wanted: np.ndarray, dtype: torch.dtype
) -> None:
    pipe = _load(folder)
    args, kwargs = chain("sd-2").calls[1]
    with torch.no_grad():
        exact = pipe.unet(*args, **kwargs).sample
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    remedy = rf"use qdiff_fx.convert\(prepared, dtype={dtype}\), or qdiff_fx.load\(folder, dtype={dtype}\)"
    with pytest.warns(QDiffWarning, match=rf"stays in its carrier type torch.float32: .*{remedy}") as caught:
        assert pipe.to(dtype) is pipe
    assert len(caught) == 1
    assert _dtypes(pipe) == {"unet": torch.float32, "vae": dtype, "text_encoder": dtype}
    after = pipe.unet.state_dict()
    assert all(
        tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]) for name, tensor in before.items()
    )
    with torch.no_grad():
        assert torch.equal(pipe.unet(*args, **kwargs).sample, exact)
    # bfloat16 keeps 8 bits; encoder and decoder of this pipeline have some 50 layers.
    assert 0 < np.abs(_images(pipe) - wanted).mean() < 0.05
    pipe.to(torch.float32)
    assert set(_dtypes(pipe).values()) == {torch.float32}


def test_a_type_at_loading_is_that_of_the_other_parts(folder: Path, wanted: np.ndarray) -> None:
    pipe = _load(folder, dtype=torch.bfloat16)
    assert _dtypes(pipe) == {"unet": torch.float32, "vae": torch.bfloat16, "text_encoder": torch.bfloat16}
    # bfloat16 keeps 8 bits; encoder and decoder of this pipeline have some 50 layers.
    assert 0 < np.abs(_images(pipe) - wanted).mean() < 0.05


def test_the_remedies_give_a_pipeline_of_one_type(
    chain: Chain, folder: Path, wanted: np.ndarray, tmp_path: Path
) -> None:
    parts = stable_parts(folder.parent / "same parts")
    pipe: Any = StableDiffusionPipeline(unet=chain("sd-2").model, **parts)
    pipe.unet = qdiff_fx.convert(chain("sd-2").prepared, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    args, kwargs = chain("sd-2").calls[1]
    call = (args[0].bfloat16(), *args[1:])
    with torch.no_grad():
        other = qdiff_fx.load(chain("sd-2").folder, dtype=torch.bfloat16)
        assert torch.equal(other(*call, **kwargs).sample, pipe.unet(*call, **kwargs).sample)
    pipe.to(torch.bfloat16).save_pretrained(tmp_path)
    seen = _images(pipe)
    # The network's own roundings move with its carrier type, so this is not only the other parts' bfloat16.
    assert 0 < np.abs(seen - wanted).mean() < 0.1
    kept = _load(tmp_path, dtype=torch.bfloat16)
    assert set(_dtypes(kept).values()) == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(kept.unet(*call, **kwargs).sample, pipe.unet(*call, **kwargs).sample)
    # The other parts come from another place in memory, where sums of bfloat16 may be taken in another order.
    assert np.abs(_images(kept) - seen).mean() < 0.02


def test_a_call_returns_the_type_of_its_sample(chain: Chain) -> None:
    run = chain("sd-2")
    args, kwargs = run.calls[1]
    half = (args[0].half(), *args[1:])  # a type that the carrier is not
    for model in (run.prepared, run.quantized):
        with torch.no_grad():
            seen, plain = model(*half, **kwargs).sample, model(*half, **kwargs, return_dict=False)[0]
            exact = model(half[0].float(), *args[1:], **kwargs).sample
        assert seen.dtype == plain.dtype == torch.float16 and exact.dtype == torch.float32
        assert torch.equal(seen, exact.half())


def test_a_device_map_places_the_whole_network(
    folder: Path, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = _load(folder, device_map="cpu")
    assert pipe.unet.device.type == "cpu" and np.array_equal(_images(pipe), wanted)
    monkeypatch.setattr(qdiff_fx.QuantizedUNet, "load", classmethod(lambda _, *_args, device, **_options: device))
    for place in ("meta", {"": "meta"}):  # stands for any other device
        assert qdiff_fx.QuantizedUNet.from_pretrained(folder / "unet", device_map=place) == torch.device("meta")


def test_a_map_over_several_devices_is_refused_with_the_remedy(folder: Path) -> None:
    with pytest.raises(InputError, match=r"device_map=.* lies on one device, .* want a device such as 'cuda:0', or"):
        qdiff_fx.QuantizedUNet.from_pretrained(folder / "unet", device_map={"down": "cpu", "up": "meta"})
    with pytest.raises(BackendError, match=r"device 'sequential' cannot be used here: .* want 'cpu' or a device"):
        qdiff_fx.QuantizedUNet.from_pretrained(folder / "unet", device_map="sequential")
    with pytest.raises(InputError, match=r"a config does not describe; .* device_map='cuda' or none .* 'balanced'"):
        _load(folder, device_map="balanced")


def test_model_offloading_runs_the_network_again_and_again(pipe: Any, wanted: np.ndarray) -> None:
    pipe.enable_model_cpu_offload(device="cpu")  # hooks of accelerate; a machine without a GPU has no other device
    assert type(pipe.unet._hf_hook).__name__ == "CpuOffload"
    for _ in range(2):
        assert np.array_equal(_images(pipe), wanted)
    pipe.remove_all_hooks()


def test_offloading_of_single_layers_is_refused(pipe: Any) -> None:
    """Its tensors are read by kernels, not by the layers that such hooks are put on."""
    with pytest.raises(ValueError, match="QuantizedUNet does not support group offloading"):
        pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
