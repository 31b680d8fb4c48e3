"""Prepared and quantized models stand where the original stood: same call, same result types, same attributes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

import qdiff_fx
from qdiff_fx.errors import InputError
from qdiff_fx.fake_quantize import QuantizerMode
from subjects import CONTEXT, Preparer, calls_of, signal_to_noise, sketch_inputs


@pytest.fixture(scope="session")
def quantized_conditional(preparer: Preparer, conditional: nn.Module) -> qdiff_fx.QuantizedUNet:
    torch.manual_seed(0)
    return qdiff_fx.convert(preparer.fitted(conditional, "w8a8"), backend="reference")


def _noise(batch: int = 2, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(batch, 3, height, width)


# ---------------------------------------------------------------------------------------- the call


def test_results_come_in_the_original_types(
    unconditional: nn.Module, preparer: Preparer, quantized: qdiff_fx.QuantizedUNet
) -> None:
    x = _noise()
    for model in (unconditional, preparer(unconditional), quantized):
        with torch.no_grad():
            output, plain = model(x, 3), model(x, 3, return_dict=False)
        assert type(output).__name__.endswith("Output") and isinstance(output.sample, Tensor)
        assert torch.equal(output[0], output.sample) and torch.equal(output["sample"], output.sample)
        assert type(plain) is tuple and len(plain) == 1 and torch.equal(plain[0], output.sample)


def test_a_foreign_module_returns_its_own_type(preparer: Preparer, sketch: nn.Module) -> None:
    quantized = qdiff_fx.convert(preparer.fitted(sketch), backend="reference")
    assert type(quantized(*sketch_inputs())) is Tensor
    assert "return_dict" not in inspect.signature(sketch.forward).parameters


def test_config_dtype_device_and_attributes_are_the_originals(
    unconditional: nn.Module, preparer: Preparer, quantized: qdiff_fx.QuantizedUNet
) -> None:
    for model in (preparer(unconditional), quantized):
        assert model.dtype == torch.float32 and model.device == torch.device("cpu")
        assert model.config.in_channels == 3 and model.config["sample_size"] == 8
        assert model.in_channels == 3 and model.sample_size == 8 and not model.training
        assert {key: value for key, value in unconditional.config.items() if not key.startswith("_")}.items() <= dict(
            model.config
        ).items()
        with pytest.raises(AttributeError, match="no attribute 'imaginary'"):
            model.imaginary  # noqa: B018


def test_parts_of_the_original_can_be_read_but_not_reached(
    conditional: nn.Module, preparer: Preparer, quantized_conditional: qdiff_fx.QuantizedUNet, tmp_path: Path
) -> None:
    """As SDXL's pipeline reads unet.add_embedding.linear_1.in_features."""
    qdiff_fx.save(quantized_conditional, tmp_path)
    loaded = qdiff_fx.load(tmp_path, backend="reference")
    for model in (preparer(conditional), quantized_conditional, loaded, copy.deepcopy(quantized_conditional)):
        names = set(model.state_dict())
        assert model.time_embedding.linear_1.in_features == conditional.time_embedding.linear_1.in_features
        assert model.conv_in.weight.is_meta and model.encoder_hid_proj is None
        assert set(model.state_dict()) == names and not any(item.is_meta for item in model.parameters())
        with pytest.raises(AttributeError, match="set_attn_processor"):
            model.set_attn_processor  # noqa: B018


def test_a_foreign_module_has_no_skeleton(preparer: Preparer, sketch: nn.Module) -> None:
    quantized = qdiff_fx.convert(preparer.fitted(sketch), backend="reference")
    with pytest.raises(AttributeError, match="stem"):
        quantized.stem  # noqa: B018


def test_conditions_of_another_batch_are_refused(
    conditional: nn.Module, preparer: Preparer, quantized_conditional: qdiff_fx.QuantizedUNet, tmp_path: Path
) -> None:
    qdiff_fx.save(quantized_conditional, tmp_path)
    loaded = qdiff_fx.load(tmp_path, backend="reference")
    assert loaded.signature == quantized_conditional.signature
    for model in (preparer(conditional), quantized_conditional, loaded):
        for rows in (1, 2):
            with pytest.raises(InputError, match=rf"encoder_hidden_states: {rows} rows for a batch of 4; repeat it"):
                model(_noise(4), 3, encoder_hidden_states=torch.randn(rows, 7, CONTEXT))


# ------------------------------------------------------------------------------------- in samplers


@pytest.mark.parametrize("name", ["quantized", "prepared"])
def test_a_ddim_pipeline_runs_with_it(
    name: str, unconditional: UNet2DModel, preparer: Preparer, quantized: qdiff_fx.QuantizedUNet
) -> None:
    scheduler = DDIMScheduler(clip_sample=False)

    def sample(unet: Any) -> Tensor:
        pipe = DDIMPipeline(unet=unet, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        result = pipe(
            batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(5), output_type="numpy"
        )
        return torch.from_numpy(result.images)

    model = quantized if name == "quantized" else preparer(unconditional)
    wanted, seen = sample(unconditional), sample(model)
    if name == "prepared":  # observes, and stays full precision until calibrated
        assert (seen - wanted).abs().max() < 1e-5
        plan = qdiff_fx.convert(model, backend="reference")
        assert signal_to_noise(wanted, sample(plan)) > 10
    else:
        assert 10 < signal_to_noise(wanted, seen) < 60


def test_a_guided_loop_runs_with_it(conditional: nn.Module, quantized_conditional: qdiff_fx.QuantizedUNet) -> None:
    """As StableDiffusionPipeline calls its UNet: both branches in one batch, keyword arguments, 0-d int timesteps."""
    context = torch.randn(4, 7, CONTEXT)

    def sample(unet: nn.Module) -> Tensor:
        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(3)
        latents = torch.randn(2, unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            output = unet(
                both,
                t,
                encoder_hidden_states=context,
                timestep_cond=None,
                cross_attention_kwargs=None,
                added_cond_kwargs=None,
                return_dict=False,
            )[0]
            without, conditioned = output.chunk(2)
            latents = scheduler.step(without + 3.0 * (conditioned - without), t, latents, return_dict=False)[0]
        return latents

    with torch.no_grad():
        assert 15 < signal_to_noise(sample(conditional), sample(quantized_conditional)) < 80


def test_a_prepared_model_is_full_precision_until_calibrated(preparer: Preparer, sketch: nn.Module) -> None:
    prepared, inputs = preparer(sketch, example_inputs=sketch_inputs()), sketch_inputs()
    with torch.no_grad():
        wanted = sketch(*inputs)
        # The split of the shortcut changes the order of a float32 sum.
        torch.testing.assert_close(prepared(*inputs), wanted, rtol=1e-5, atol=1e-6)
        qdiff_fx.calibrate(prepared, calls_of(sketch), progress=False)
        assert (prepared(*inputs) - wanted).abs().max() > 1e-4
        torch.testing.assert_close(prepared.set_mode(QuantizerMode.PASS)(*inputs), wanted, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------- in another carrier type


def test_convert_makes_a_bfloat16_model_close_to_the_float32_one(preparer: Preparer, sketch: nn.Module) -> None:
    prepared = preparer.fitted(sketch, "w8a8")
    float32 = qdiff_fx.convert(prepared, backend="reference")
    bfloat16 = qdiff_fx.convert(prepared, backend="reference", dtype=torch.bfloat16)
    assert bfloat16.dtype == torch.bfloat16 and float32.dtype == torch.float32
    (x, t), _ = calls_of(sketch)[1]
    seen = bfloat16(x.bfloat16(), t)
    assert seen.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: 2^-9 of relative rounding in each of some ten operators in a row is 35 to 45 dB.
    assert signal_to_noise(float32(x, t), seen) > 25
    dtypes = {tensor.dtype for name, tensor in bfloat16.plan.state_dict().items() if name.endswith(("_scale",))}
    assert dtypes == {torch.float32}, "scales are not rounded"
    before = {name: tensor.clone() for name, tensor in bfloat16.state_dict().items()}
    after = bfloat16.to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), "nor by a cast to what it is"


def test_a_bfloat16_unet_keeps_its_timesteps(preparer: Preparer, unconditional: nn.Module) -> None:
    """bfloat16 would round timestep 999 to 1000."""
    converted = qdiff_fx.convert(preparer.fitted(unconditional), backend="reference", dtype=torch.bfloat16)
    x = _noise().bfloat16()
    seen = [converted(x, t).sample for t in (997, 999, torch.tensor([999, 999]))]
    assert seen[0].dtype == torch.bfloat16
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])


# --------------------------------------------------------------------------- nothing else is left


def _tensors(root: Any, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that is reachable from `root` through attributes and containers, with where it was found."""
    pending: list[tuple[str, Any]] = [("", root)]
    while pending:
        path, value = pending.pop()
        if id(value) in seen or len(path) > 400:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if type(value) in (Tensor, nn.Parameter):  # fakes in metadata hold no values
                yield path, value
        elif isinstance(value, dict):
            pending += [(f"{path}[{key}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set)):
            pending += [(f"{path}[]", item) for item in value]
        elif type(value).__module__.split(".")[0] in ("qdiff_fx", "torch") and hasattr(value, "__dict__"):
            if type(value).__module__.startswith(("torch.fx.experimental", "torch._")):
                continue
            pending += [(f"{path}.{key}", item) for key, item in vars(value).items()]


@pytest.mark.parametrize("release", [False, True])
def test_no_floating_copy_of_a_quantized_weight_is_left(
    preparer: Preparer, unconditional: nn.Module, release: bool
) -> None:
    prepared = preparer.fitted(unconditional, "w4a8")
    quantized = qdiff_fx.convert(prepared, backend="reference", release=release)
    found = list(_tensors(quantized, set()))
    weights = {name: item for name, item in unconditional.named_parameters() if item.dim() > 1}
    packed = [path for path, tensor in found if tensor.dtype in (torch.uint8, torch.int8)]
    assert len(packed) >= len(weights), "the walk reaches the packed weights"
    storages = {item.untyped_storage().data_ptr(): name for name, item in weights.items()}
    smallest = min(item.numel() for item in weights.values())
    for path, tensor in found:
        if tensor.is_floating_point():
            assert tensor.untyped_storage().data_ptr() not in storages, path
            assert tensor.dim() <= 1 or tensor.numel() < smallest, f"{path}: {tuple(tensor.shape)}"


def test_release_consumes_the_prepared_model(preparer: Preparer, sketch: nn.Module) -> None:
    prepared, inputs = preparer.fitted(sketch), sketch_inputs()
    wanted = qdiff_fx.convert(preparer.fitted(sketch), backend="reference")(*inputs)
    quantized = qdiff_fx.convert(prepared, backend="reference", release=True)
    assert torch.equal(quantized(*inputs), wanted)
    assert not list(prepared.parameters()) and not list(prepared.graph_module.named_modules())[1:]
    assert all(bool(torch.isfinite(parameter).all()) for parameter in sketch.parameters()), "the original is untouched"


def _state(module: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: (tensor.data_ptr(), tensor._version) for name, tensor in module.state_dict().items()},
        "values": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "gradients": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "training": [child.training for child in module.modules()],
        "hooks": [len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules()],
        "attributes": [sorted(vars(child)) for child in module.modules()],
    }


def test_nothing_that_is_done_with_it_changes_the_module(sketch: nn.Module) -> None:
    module = copy.deepcopy(sketch)
    module.stem.weight.requires_grad_(False)
    before = _state(module)
    prepared = qdiff_fx.prepare(module, example_inputs=sketch_inputs())
    prepared(*sketch_inputs())
    qdiff_fx.calibrate(prepared, calls_of(module), progress=False)
    quantized = qdiff_fx.convert(prepared, backend="reference")
    quantized(*sketch_inputs())
    qdiff_fx.convert(prepared, backend="reference", dtype=torch.bfloat16, release=True)
    after = _state(module)
    values = before.pop("values"), after.pop("values")
    assert after == before
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])


def test_a_converted_model_is_inference_only(quantized: qdiff_fx.QuantizedUNet) -> None:
    assert not any(parameter.requires_grad for parameter in quantized.parameters()) and not quantized.training
    assert not quantized(_noise(), 3).sample.requires_grad
