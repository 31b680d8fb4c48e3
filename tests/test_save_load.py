"""A loaded model is the saved one: equal bits, equal call, equal report, on any backend that can run it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import nn

import qdiff_fx
from qdiff_fx.assets import load_unconditional
from qdiff_fx.errors import BackendError, ConversionError, QDiffWarning
from qdiff_fx.graph.meta import ATTENTION, BLOCK, FIXED_DTYPE, LAYER, MODULE_PATH, SPLIT_ADD, SPLIT_PART
from subjects import CONTEXT, sketch_inputs

FP32_BYTES = 15_785_516
"""The bundled unconditional model as fp32 safetensors."""


@pytest.fixture(scope="module")
def converted(sketch: nn.Module, preparer: Any) -> qdiff_fx.QuantizedUNet:
    return qdiff_fx.convert(preparer.fitted(sketch), backend="reference")


@pytest.fixture(scope="module")
def stored(converted: qdiff_fx.QuantizedUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    qdiff_fx.save(converted, folder)
    return folder


def _run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


@pytest.mark.parametrize("preset", ["w8a8", "w4a32", "w4a4"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_outputs_are_bit_equal(
    sketch: nn.Module, preparer: Any, tmp_path: Path, preset: str, dtype: torch.dtype | None
) -> None:
    saved = qdiff_fx.convert(preparer.fitted(sketch, preset), backend="reference", dtype=dtype)
    qdiff_fx.save(saved, tmp_path)
    loaded = qdiff_fx.load(tmp_path, "reference")
    assert loaded.dtype == saved.dtype
    assert loaded.plan.code == saved.plan.code
    for inputs in (sketch_inputs(2), (torch.randn(3, 2, 4, 12), 7)):
        assert torch.equal(_run(loaded, *inputs), _run(saved, *inputs))


@pytest.mark.parametrize("preset", ["w8a8", "w4a32"])
def test_a_type_at_loading_gives_what_convert_gives_in_it(
    sketch: nn.Module, preparer: Any, tmp_path: Path, preset: str
) -> None:
    prepared = preparer.fitted(sketch, preset)
    qdiff_fx.save(qdiff_fx.convert(prepared, backend="reference"), tmp_path / "float32")
    wanted = qdiff_fx.convert(prepared, backend="reference", dtype=torch.bfloat16)
    loaded = qdiff_fx.load(tmp_path / "float32", "reference", dtype=torch.bfloat16)
    qdiff_fx.save(loaded, tmp_path / "bfloat16")
    for model in (loaded, qdiff_fx.load(tmp_path / "bfloat16", "reference")):
        assert model.dtype == torch.bfloat16 and model.plan.code == wanted.plan.code
        for inputs in (sketch_inputs(2), (torch.randn(3, 2, 4, 12), 7)):
            assert torch.equal(_run(model, *inputs), _run(wanted, *inputs))
    same = qdiff_fx.load(tmp_path / "float32", "reference", dtype=torch.float32)
    assert same.dtype == torch.float32 and not torch.equal(
        _run(same, *sketch_inputs(2)), _run(wanted, *sketch_inputs(2))
    )


def test_a_float16_carrier_is_refused_at_loading_where_calibration_saw_too_much(
    sketch: nn.Module, preparer: Any, tmp_path: Path
) -> None:
    converted = qdiff_fx.convert(preparer.fitted(sketch), backend="reference")
    converted.calibration = {"maxima": {"somewhere": 20_000.0, "elsewhere": 3.0}}
    qdiff_fx.save(converted, tmp_path)
    with pytest.raises(ConversionError, match=r"somewhere: \|x\| reached 2e\+04 .*; use dtype=torch.bfloat16"):
        qdiff_fx.load(tmp_path, "reference", dtype=torch.float16)
    with pytest.raises(ConversionError, match=r"dtype=torch.int8: want a carrier type"):
        qdiff_fx.load(tmp_path, "reference", dtype=torch.int8)


@pytest.mark.parametrize(
    ("median", "accepted", "warned"), [(4.0, False, True), (24.0, True, False), (None, True, False)]
)
def test_loading_warns_in_one_line_of_a_model_that_calibration_found_ruined(
    converted: qdiff_fx.QuantizedUNet, tmp_path: Path, median: float | None, accepted: bool, warned: bool
) -> None:
    model = copy.copy(converted)
    quality = {"samples": 8, "pooled_db": 11.5, "median_db": median, "by_timestep": [], "accepted": accepted}
    model.calibration = {"quality": quality}
    qdiff_fx.save(model, tmp_path)
    expected = pytest.warns(QDiffWarning, match=r"11\.5 dB pooled, 4\.0 dB in the median .*ruined$")
    with expected if warned else nullcontext():
        loaded = qdiff_fx.load(tmp_path, backend="reference")
    assert loaded.calibration["quality"] == quality


def test_a_diffusers_model_keeps_its_call_and_config(unconditional: nn.Module, preparer: Any, tmp_path: Path) -> None:
    prepared = preparer.fitted(unconditional, "w4a8")
    saved = qdiff_fx.convert(prepared, backend="reference")
    qdiff_fx.save(saved, tmp_path)
    loaded = qdiff_fx.load(tmp_path, backend="reference")
    sample = torch.randn(2, 3, 8, 8)
    assert torch.equal(_run(loaded, sample, 5).sample, _run(saved, sample, 5).sample)
    assert torch.equal(_run(loaded, sample, 5, return_dict=False)[0], _run(saved, sample, 5).sample)
    assert loaded.config.block_out_channels == [8, 16] and loaded.in_channels == 3
    assert loaded.qdiff_config == saved.qdiff_config and loaded.calibration == saved.calibration


def test_named_inputs_and_dynamic_context_survive(conditional: nn.Module, preparer: Any, tmp_path: Path) -> None:
    prepared = preparer.fitted(conditional, "w4a8")
    saved = qdiff_fx.convert(prepared, backend="reference")
    qdiff_fx.save(saved, tmp_path)
    loaded = qdiff_fx.load(tmp_path, "reference")
    call = {"sample": torch.randn(4, 3, 8, 16), "timestep": 3, "encoder_hidden_states": torch.randn(4, 9, CONTEXT)}
    assert torch.equal(_run(loaded, **call).sample, _run(saved, **call).sample)


def test_what_passes_wrote_on_the_nodes_survives(converted: qdiff_fx.QuantizedUNet, stored: Path) -> None:
    loaded = qdiff_fx.load(stored, "reference")
    pairs = zip(converted.plan.graph.nodes, loaded.plan.graph.nodes, strict=True)
    for before, after in pairs:
        assert before.name == after.name and before.op == after.op
        for key in (ATTENTION, BLOCK, FIXED_DTYPE, LAYER, SPLIT_ADD, SPLIT_PART):
            assert key.get(after) == key.get(before)
        assert (MODULE_PATH.get(after) or "") == (MODULE_PATH.get(before) or "")
    assert str(loaded.lowering_report()) == str(converted.lowering_report())


def test_a_loaded_model_saves_to_the_same_bytes(stored: Path, tmp_path: Path) -> None:
    qdiff_fx.save(qdiff_fx.load(stored, "reference"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in stored.iterdir()
    }


def test_a_copy_of_a_loaded_model_runs(stored: Path) -> None:
    loaded = qdiff_fx.load(stored, "reference")
    inputs = sketch_inputs()
    assert torch.equal(_run(copy.deepcopy(loaded), *inputs), _run(loaded, *inputs))


def test_a_loaded_model_compiles_without_breaks_or_recompiles(stored: Path, unchecked_shapes: None) -> None:
    loaded = qdiff_fx.load(stored, "reference")
    compiled = torch.compile(qdiff_fx.load(stored, "reference"), fullgraph=True, backend="eager")
    inputs = sketch_inputs()
    assert torch.equal(_run(compiled, *inputs), _run(loaded, *inputs))

    dynamic = qdiff_fx.load(stored, "reference").compile(backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 2, 8, 8), (3, 2, 8, 8), (4, 2, 8, 16)):
            inputs = torch.randn(shape), torch.linspace(0.0, 999.0, shape[0])
            assert torch.equal(_run(dynamic, *inputs), _run(loaded, *inputs))


def test_a_compiled_model_can_be_saved(converted: qdiff_fx.QuantizedUNet, stored: Path, tmp_path: Path) -> None:
    qdiff_fx.save(torch.compile(converted), tmp_path)
    assert (tmp_path / "plan.json").read_bytes() == (stored / "plan.json").read_bytes()


def test_save_wants_a_converted_model(sketch: nn.Module, preparer: Any, tmp_path: Path) -> None:
    prepared = preparer(sketch, qdiff_fx.QDiffConfig.preset("w8a8"), example_inputs=sketch_inputs())
    for model in (sketch, prepared):
        with pytest.raises(ConversionError, match=r"save\(\) takes what convert\(\) returned"):
            qdiff_fx.save(model, tmp_path)


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_load_wants_a_device_that_is_there(stored: Path, device: str) -> None:
    with pytest.raises(BackendError, match=f"device '{device}' cannot be used here: .*; want 'cpu' or a device"):
        qdiff_fx.load(stored, device=device)


def test_load_wants_a_known_backend(stored: Path) -> None:
    with pytest.raises(BackendError, match="backend 'abacus'"):
        qdiff_fx.load(stored, backend="abacus")


def test_a_pipeline_saves_and_loads_a_converted_model(unconditional: nn.Module, preparer: Any, tmp_path: Path) -> None:
    prepared = preparer.fitted(unconditional, "w8a8")
    model = qdiff_fx.convert(prepared, backend="reference")
    pipeline = DDIMPipeline(unet=model, scheduler=DDIMScheduler())
    pipeline.save_pretrained(tmp_path)
    loaded = DDIMPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert isinstance(loaded.unet, qdiff_fx.QuantizedUNet)
    # Pipelines load with the best backend of the machine; images are compared on one backend.
    loaded.unet = qdiff_fx.QuantizedUNet.from_pretrained(tmp_path, subfolder="unet", backend="reference")
    images = []
    for item in (pipeline, loaded):
        item.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(item(num_inference_steps=2, generator=generator, output_type="np").images)
    assert (images[0] == images[1]).all()


def test_the_bundled_model_at_four_bits_takes_at_most_15_percent_of_fp32(tmp_path: Path) -> None:
    pipeline = load_unconditional()
    prepared = qdiff_fx.prepare(pipeline.unet, qdiff_fx.QDiffConfig.preset("w4a8", weight_slack=0.0, equalize=False))
    _run(prepared, torch.randn(2, 1, 28, 28), 500)
    qdiff_fx.save(qdiff_fx.convert(prepared, backend="reference"), tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 0.15 * FP32_BYTES


@pytest.mark.slow
def test_with_the_default_slack_it_takes_at_most_16_percent(tmp_path: Path) -> None:
    pipeline = load_unconditional()
    prepared = qdiff_fx.prepare(pipeline.unet, qdiff_fx.QDiffConfig.preset("w4a8"))
    data = qdiff_fx.CalibrationSet.collect(
        pipeline, num_inference_steps=10, num_timesteps=10, samples_per_timestep=4, progress=False
    )
    qdiff_fx.calibrate(prepared, data, progress=False)
    qdiff_fx.save(qdiff_fx.convert(prepared, backend="reference"), tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 0.16 * FP32_BYTES
