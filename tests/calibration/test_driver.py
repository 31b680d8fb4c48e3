"""calibrate(): every grid from samples of every timestep, resumable, and only from calls of the same model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import nn

import qdiff_fx
from qdiff_fx.calibration import CalibrationSet, driver
from qdiff_fx.calibration.driver import activation_quantizers, weight_quantizers
from qdiff_fx.errors import CalibrationError, CheckpointError, ConfigError, ConversionError, InputError, QDiffWarning
from qdiff_fx.fake_quantize import QuantizerMode
from subjects import PLAIN, Preparer, Sketch, calls_of, sketch_inputs, unconditional_unet

FAST = qdiff_fx.QDiffConfig.preset("w4a8", weight_observer="minmax", **PLAIN)


def _prepared(preparer: Preparer, sketch: nn.Module, config: qdiff_fx.QDiffConfig = FAST) -> qdiff_fx.PreparedUNet:
    return preparer(sketch, config, example_inputs=sketch_inputs())


def _grids(prepared: qdiff_fx.PreparedUNet) -> dict[str, tuple[float, int]]:
    quantizers = dict(activation_quantizers(prepared.graph_module)).values()
    return {item.name: (float(item.scale), int(item.zero_point)) for item in quantizers}


def test_every_quantizer_is_fitted_and_keeps_its_range_at_every_timestep(preparer: Preparer, sketch: nn.Module) -> None:
    prepared = _prepared(preparer, sketch)
    levels = (1.0, 250.0, 500.0, 999.0)
    report = qdiff_fx.calibrate(prepared, calls_of(sketch, timesteps=levels), progress=False)
    assert report.timesteps == levels and report.samples == 16
    assert prepared.calibrated and all(item.calibrated for item, _ in weight_quantizers(prepared.graph_module))
    names = [row["name"] for row in report.quantizers]
    assert names == list(_grids(prepared)) and len(names) == 10
    for row in report.quantizers:
        assert [entry[0] for entry in row["by_timestep"]] == list(levels), row["name"]
        assert row["minimum"] == min(entry[1] for entry in row["by_timestep"])
        assert row["maximum"] == max(entry[2] for entry in row["by_timestep"])
        assert row["scale"] > 0 and row["channel_maxima"]
    assert [row["name"] for row in report.layers].count("wide") == 1 and len(report.layers) == 9


def test_grids_come_from_all_timesteps_not_from_the_first(preparer: Preparer, sketch: nn.Module) -> None:
    """An input that grows with the noise level saturates a grid that saw the first level only."""
    config = FAST.replace(activation_observer="minmax")
    calls = [
        ((sample * scale, level), {}) for scale, ((sample, level), _) in zip((1, 4, 16), calls_of(sketch), strict=True)
    ]
    scales = {}
    for count in (1, 3):
        prepared = _prepared(preparer, sketch, config)
        qdiff_fx.calibrate(prepared, calls[:count], progress=False)
        scales[count] = _grids(prepared)["skip#1.input"][0]
    assert scales[3] > 8 * scales[1]


def test_batch_size_does_not_change_an_exact_range(preparer: Preparer, sketch: nn.Module) -> None:
    grids = []
    for batch_size in (3, 32):
        prepared = _prepared(preparer, sketch, FAST.replace(activation_observer="minmax"))
        qdiff_fx.calibrate(prepared, calls_of(sketch), batch_size=batch_size, progress=False)
        grids.append({name: scale for name, (scale, _) in _grids(prepared).items()})
    # Convolutions of another batch size may round their last bit another way.
    assert grids[0] == pytest.approx(grids[1], rel=1e-5)


def test_a_second_calibration_replaces_the_first(preparer: Preparer, sketch: nn.Module) -> None:
    wide = [((args[0] * 10, args[1]), kwargs) for args, kwargs in calls_of(sketch)]
    fresh, again = _prepared(preparer, sketch), _prepared(preparer, sketch)
    qdiff_fx.calibrate(fresh, calls_of(sketch), progress=False)
    qdiff_fx.calibrate(again, wide, progress=False)
    assert _grids(again) != _grids(fresh)
    qdiff_fx.calibrate(again, calls_of(sketch), progress=False)
    assert _grids(again) == _grids(fresh)


def test_the_short_way_prepare_sample_convert(preparer: Preparer, sketch: nn.Module) -> None:
    prepared = _prepared(preparer, sketch)
    with torch.no_grad():
        for args, kwargs in calls_of(sketch):
            prepared(*args, **kwargs)
    quantized = qdiff_fx.convert(prepared, backend="reference")
    (x, t), _ = calls_of(sketch)[0]
    with torch.no_grad():
        wanted = sketch(x, t)
        error = (quantized(x, t) - wanted).norm() / wanted.norm()
    assert 0 < error < 0.2
    ranges = dict(activation_quantizers(prepared.graph_module)).values()
    assert all([entry.timestep for entry in item.statistics.ranges()] == [0.0, 500.0, 999.0] for item in ranges)


def test_converting_what_observed_nothing_names_the_first_quantizer(preparer: Preparer, sketch: nn.Module) -> None:
    # The stem's output is the first quantized tensor; the shortcut reads it much later.
    with pytest.raises(CalibrationError, match=r"^skip#1\.input: its input was never observed; run calibrate"):
        qdiff_fx.convert(_prepared(preparer, sketch))


class _Killed(BaseException):
    """What a killed process looks like from inside: no handler runs."""


def _interrupted(prepared: qdiff_fx.PreparedUNet, data: Any, folder: Path, batches: int, **options: Any) -> int:
    """Start calibrate and die after so many forward passes; returns how many ran."""
    count = 0
    forward = type(prepared).run

    def run(self: qdiff_fx.PreparedUNet, inputs: Any) -> Any:
        nonlocal count
        if count == batches:
            raise _Killed
        count += 1
        return forward(self, inputs)

    with patch.object(type(prepared), "run", run), pytest.raises(_Killed):
        qdiff_fx.calibrate(prepared, data, checkpoint_dir=folder, progress=False, **options)
    return count


@pytest.mark.parametrize("killed_after", [1, 4, 5])
def test_a_killed_calibration_continues_to_equal_grids(
    preparer: Preparer, sketch: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    monkeypatch.setattr(driver, "SAVE_EVERY", 2)
    data = CalibrationSet.from_samples(calls_of(sketch))
    whole = _prepared(preparer, sketch)
    qdiff_fx.calibrate(whole, data, batch_size=2, progress=False)
    _interrupted(_prepared(preparer, sketch), data, tmp_path, killed_after, batch_size=2)
    resumed, passes = _prepared(preparer, sketch), []
    handle = resumed.graph_module.register_forward_pre_hook(lambda *_: passes.append(resumed.graph_module))
    qdiff_fx.calibrate(resumed, data, batch_size=2, checkpoint_dir=tmp_path, progress=False)
    handle.remove()
    assert _grids(resumed) == _grids(whole)
    observing = 6 - killed_after // 2 * 2
    assert len(passes) >= observing


def test_a_torn_checkpoint_starts_over(preparer: Preparer, sketch: nn.Module, tmp_path: Path) -> None:
    first = _prepared(preparer, sketch)
    qdiff_fx.calibrate(first, calls_of(sketch), checkpoint_dir=tmp_path, progress=False)
    state = tmp_path / "observation.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    again = _prepared(preparer, sketch)
    qdiff_fx.calibrate(again, calls_of(sketch), checkpoint_dir=tmp_path, progress=False)
    assert _grids(again) == _grids(first)


@pytest.mark.parametrize("change", ["config", "data", "weights"])
def test_a_checkpoint_of_another_run_is_refused(
    preparer: Preparer, sketch: nn.Module, tmp_path: Path, change: str
) -> None:
    qdiff_fx.calibrate(_prepared(preparer, sketch), calls_of(sketch), checkpoint_dir=tmp_path, progress=False)
    module, config, calls = sketch, FAST, calls_of(sketch)
    if change == "config":
        config = FAST.replace(weight_bits=8)
    elif change == "data":
        calls = calls_of(sketch, timesteps=(1.0, 2.0))
    else:
        module = Sketch().eval()
    with pytest.raises(CheckpointError, match="holds the calibration of another model, config or calibration set"):
        qdiff_fx.calibrate(_prepared(preparer, module, config), calls, checkpoint_dir=tmp_path, progress=False)


# ------------------------------------------------------------------------- sets of another model


def _call(**shapes: tuple[int, ...]) -> list[Any]:
    return [(tuple(torch.zeros(*shape) for shape in shapes.values()), {})]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (_call(sample=(4, 1, 8, 8), timestep=(4,)), r"sample: shape \(1, 1, 8, 8\), want 2 in dimension 1"),
        (_call(sample=(4, 2, 7, 8), timestep=(4,)), "sample: 7 x 8, want multiples of 2"),
        (_call(sample=(4, 2, 8, 8)), "timestep is not given"),
        (_call(sample=(4, 2, 8, 8), timestep=(4,), context=(4, 7, 6)), "3 positional arguments, the model takes 2"),
    ],
)
def test_calls_of_another_shape_are_refused(
    preparer: Preparer, sketch: nn.Module, calls: list[Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=f"the calibration set does not fit the model: {message}"):
        qdiff_fx.calibrate(_prepared(preparer, sketch), calls, progress=False)


def test_another_context_size_is_refused(preparer: Preparer, conditional: nn.Module) -> None:
    calls = _call(sample=(4, 3, 8, 8), timestep=(4,), context=(4, 7, 5))
    with pytest.raises(CalibrationError, match=r"encoder_hidden_states: shape \(1, 7, 5\), want 6 in dimension 2"):
        qdiff_fx.calibrate(preparer(conditional), calls, progress=False)


def test_a_set_that_was_collected_from_another_config_is_refused(preparer: Preparer, unconditional: nn.Module) -> None:
    other = unconditional_unet(norm_num_groups=2)
    data = CalibrationSet.collect(
        other, scheduler=DDIMScheduler(), num_inference_steps=2, num_timesteps=1, samples_per_timestep=2, progress=False
    )
    with pytest.raises(CalibrationError, match="from another model: norm_num_groups=2 there, 4 here; collect it from"):
        qdiff_fx.calibrate(preparer(unconditional), data, progress=False)


def test_a_set_of_another_scheduler_is_refused(preparer: Preparer, unconditional: nn.Module) -> None:
    data = CalibrationSet.collect(
        unconditional,
        scheduler=DDIMScheduler(prediction_type="v_prediction"),
        num_inference_steps=2,
        num_timesteps=2,
        samples_per_timestep=5,
        progress=False,
    )
    prepared = preparer(unconditional, FAST)
    message = (
        "another scheduler: prediction_type='v_prediction' there, 'epsilon' in this DDIMScheduler; collect it with"
    )
    with pytest.raises(CalibrationError, match=message):
        qdiff_fx.calibrate(prepared, data, scheduler=DDIMScheduler(), progress=False)
    # Another sampler of the same noise process is welcome.
    sampler = DPMSolverMultistepScheduler(prediction_type="v_prediction")
    report = qdiff_fx.calibrate(prepared, data, scheduler=sampler, progress=False)
    assert report.scheduler["prediction_type"] == "v_prediction"
    quantized = qdiff_fx.convert(prepared, backend="reference")
    assert quantized.calibration["scheduler"] == report.scheduler


def test_an_empty_set_is_refused(preparer: Preparer, sketch: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="the calibration set is empty"):
        qdiff_fx.calibrate(_prepared(preparer, sketch), [], progress=False)


def test_a_refused_set_leaves_the_model_as_it_was(preparer: Preparer, sketch: nn.Module) -> None:
    prepared = _prepared(preparer, sketch)
    qdiff_fx.calibrate(prepared, calls_of(sketch), progress=False)
    grids = _grids(prepared)
    with pytest.raises(CalibrationError):
        qdiff_fx.calibrate(prepared, _call(sample=(4, 1, 8, 8), timestep=(4,)), progress=False)
    assert _grids(prepared) == grids and prepared.calibrated
    modes = {item.mode for item in dict(activation_quantizers(prepared.graph_module)).values()}
    assert modes == {QuantizerMode.QUANTIZE}


def test_a_failed_calibration_leaves_nothing_to_convert(preparer: Preparer, sketch: nn.Module) -> None:
    """Half a fit would convert without a word, into a model that nobody calibrated."""
    prepared = _prepared(preparer, sketch)
    qdiff_fx.calibrate(prepared, calls_of(sketch), progress=False)
    with patch("qdiff_fx.stages.run.decide", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        qdiff_fx.calibrate(prepared, calls_of(sketch), progress=False)
    assert not prepared.calibrated and not prepared.calibration
    with pytest.raises(CalibrationError, match="never observed"):
        qdiff_fx.convert(prepared, backend="reference")
    qdiff_fx.calibrate(prepared, calls_of(sketch), progress=False)
    qdiff_fx.convert(prepared, backend="reference")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, InputError, "batch_size=0: want a whole number"),
        ({"reconstruction": "fast"}, ConfigError, r"reconstruction is a str: want a ReconstructionConfig"),
        ({"holdout": []}, CalibrationError, "holdout is a list: want a CalibrationSet"),
        ({"data": torch.zeros(3)}, CalibrationError, "the calibration data is a Tensor: want a CalibrationSet"),
        ({"data": None}, CalibrationError, "the calibration data is a NoneType: want a CalibrationSet"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_named(
    preparer: Preparer, sketch: nn.Module, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"data": calls_of(sketch), **arguments}
    with pytest.raises(error, match=message):
        qdiff_fx.calibrate(_prepared(preparer, sketch), **options)


def test_a_holdout_of_another_model_is_refused(preparer: Preparer, sketch: nn.Module) -> None:
    holdout = CalibrationSet.from_samples(_call(sample=(4, 1, 8, 8), timestep=(4,)))
    with pytest.raises(CalibrationError, match="does not fit the model"):
        qdiff_fx.calibrate(_prepared(preparer, sketch), calls_of(sketch), holdout=holdout, progress=False)


@pytest.mark.parametrize("short_way", [False, True])
def test_an_fp16_carrier_is_refused_where_activations_are_too_large(
    preparer: Preparer, sketch: nn.Module, short_way: bool
) -> None:
    prepared = _prepared(preparer, sketch)
    calls = [((sample * 1e6, timestep), {}) for (sample, timestep), _ in calls_of(sketch)]
    if short_way:
        for args, _ in calls:
            prepared(*args)
    else:
        qdiff_fx.calibrate(prepared, calls, progress=False)
    with pytest.raises(ConversionError, match=r"\|x\| reached .* too much for an fp16 carrier \(at most 16,384\)"):
        qdiff_fx.convert(prepared, backend="reference", dtype=torch.float16)
    with pytest.raises(ConversionError, match="want a carrier type"):
        qdiff_fx.convert(prepared, backend="reference", dtype=torch.int8)
    qdiff_fx.convert(prepared, backend="reference", dtype=torch.bfloat16)


@pytest.mark.parametrize("short_way", [False, True])
def test_a_bfloat16_carrier_is_warned_of_where_channels_lie_around_large_constants(
    preparer: Preparer, sketch: nn.Module, short_way: bool
) -> None:
    def prepared(constant: float) -> qdiff_fx.PreparedUNet:
        changed = copy.deepcopy(sketch)
        with torch.no_grad():
            for name, parameter in changed.named_parameters():
                if name.endswith("bias"):
                    parameter += constant
        result = qdiff_fx.prepare(changed, FAST, example_inputs=calls_of(sketch)[0][0])
        if short_way:
            for args, _ in calls_of(sketch):
                result(*args)
        else:
            qdiff_fx.calibrate(result, calls_of(sketch), progress=False)
        return result

    model = prepared(1000.0)
    qdiff_fx.convert(model, backend="reference", dtype=torch.float32)
    with pytest.warns(QDiffWarning, match=r"around constants, .* leaves -?\d+ dB of it \(want 30\).*torch\.float32"):
        qdiff_fx.convert(model, backend="reference", dtype=torch.bfloat16)
    qdiff_fx.convert(prepared(0.0), backend="reference", dtype=torch.bfloat16)  # warnings are errors


def test_the_plan_keeps_the_maximum_of_inputs_that_went_to_the_carrier_type(
    preparer: Preparer, sketch: nn.Module
) -> None:
    prepared = _prepared(preparer, sketch, FAST.replace(activation_slack=0.5))
    report = qdiff_fx.calibrate(prepared, calls_of(sketch), progress=False)
    raised = [f"{row['layers'][0]}.input" for row in report.raises if row["kind"] == "input"]
    assert raised and all(report.summary()["maxima"][name] > 0 for name in raised)
