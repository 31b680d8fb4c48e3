"""Bad input gets one clear line that names the thing, the value and the remedy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor, nn

import qdiff_fx
from qdiff_fx import kernels
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.config import LayerRule, QDiffConfig
from qdiff_fx.errors import (
    BackendError,
    CaptureError,
    ConfigError,
    ConversionError,
    InputError,
    NonFiniteError,
    QDiffError,
)
from qdiff_fx.fake_quantize import WeightQuantizer
from qdiff_fx.kernels import BACKENDS, Backend
from qdiff_fx.stages.quality import measure_quality
from subjects import PLAIN, Preparer, calls_of, sketch_inputs


def test_every_error_is_one_line_of_one_family() -> None:
    with pytest.raises(QDiffError) as caught:
        qdiff_fx.prepare(nn.Conv2d(1, 1, 1).eval())
    assert "\n" not in str(caught.value)


def test_a_module_without_example_inputs() -> None:
    with pytest.raises(InputError, match=r"Conv2d has no diffusers config .* pass example_inputs=\(sample, timestep"):
        qdiff_fx.prepare(nn.Conv2d(1, 1, 1).eval())


def test_a_pipeline_where_a_unet_is_wanted(unconditional: nn.Module) -> None:
    pipe = DDIMPipeline(unet=unconditional, scheduler=DDIMScheduler())
    with pytest.raises(InputError, match=r"DDIMPipeline is a pipeline: pass its network, prepare\(pipe\.unet\)"):
        qdiff_fx.prepare(pipe)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"prepare\(\) takes an nn\.Module, got a str"):
        qdiff_fx.prepare("unet")  # type: ignore[arg-type]


def test_a_unet_where_a_pipeline_is_wanted_says_what_is_missing(unconditional: nn.Module) -> None:
    with pytest.raises(InputError, match="scheduler"):
        CalibrationSet.collect(unconditional, num_inference_steps=2, num_timesteps=1, samples_per_timestep=1)


def test_training_mode(sketch: nn.Module) -> None:
    training = copy.deepcopy(sketch).train()
    with pytest.raises(InputError, match=r"Sketch is in training mode; call \.eval\(\) on the whole model"):
        qdiff_fx.prepare(training, example_inputs=sketch_inputs())
    assert training.training


def test_a_submodule_in_training_mode_is_named(sketch: nn.Module) -> None:
    mixed = copy.deepcopy(sketch)
    mixed.norm.train()
    with pytest.raises(InputError, match=r"norm is in training mode; call \.eval\(\)"):
        qdiff_fx.prepare(mixed, example_inputs=sketch_inputs())


class Adapter(nn.Module):
    """A LoRA layer as adapter libraries put it around a layer."""

    def __init__(self, base_layer: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer, self.merged = base_layer, False
        self.down = nn.Conv2d(base_layer.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base_layer.out_channels, 1, bias=False)

    def merge(self) -> None:
        delta = (self.up.weight.flatten(1) @ self.down.weight.flatten(1))[..., None, None]
        self.base_layer.weight.data += delta
        self.merged = True

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) if self.merged else self.base_layer(x) + self.up(self.down(x))


def test_an_adapter_is_refused_until_it_is_fused(sketch: nn.Module) -> None:
    adapted = copy.deepcopy(sketch)
    adapted.skip = Adapter(adapted.skip)
    with pytest.raises(InputError, match=r"skip carries an adapter that is not fused .* call pipe\.fuse_lora\(\)"):
        qdiff_fx.prepare(adapted.eval(), example_inputs=sketch_inputs())
    with torch.no_grad():
        wanted = adapted(*sketch_inputs_seeded())
        adapted.skip.merge()
        prepared = qdiff_fx.prepare(adapted, example_inputs=sketch_inputs())
        torch.testing.assert_close(prepared(*sketch_inputs_seeded()), wanted, rtol=1e-4, atol=1e-5)


def sketch_inputs_seeded() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return sketch_inputs()


CONFIGS: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown preset": (lambda: QDiffConfig.preset("w3a7"), "preset 'w3a7': want one of w8a8, w4a8"),
    "one bit": (lambda: QDiffConfig(weight_bits=1), r"weight_bits=1: want an integer in 2\.\.8, or 32"),
    "nine bits": (lambda: QDiffConfig(activation_bits=9), "activation_bits=9: want an integer"),
    "half bits": (lambda: QDiffConfig(softmax_bits=4.0), r"softmax_bits=4\.0: want an integer"),  # type: ignore[arg-type]
    "a true": (lambda: QDiffConfig(attention_bits=True), "attention_bits=True: want an integer"),
    "bits in a rule": (lambda: LayerRule(module="*", weight_bits=0), r"LayerRule\.weight_bits=0: want"),
    "contradictory rules": (
        lambda: QDiffConfig(rules=(LayerRule(module="a", weight_bits=4), LayerRule(module="a", weight_bits=8))),
        "contradictory rules for the same layers: .*weight_bits=4.* and .*weight_bits=8",
    ),
    "a rule for nothing": (lambda: LayerRule(weight_bits=4), "want module= or operator="),
    "a rule without effect": (lambda: LayerRule(module="a"), "changes nothing: want weight_bits= or activation_bits="),
    "an operator that is none": (lambda: LayerRule(operator="conv3d", weight_bits=4), "'conv3d'.*: want one of conv1d"),
    "weights of attention": (lambda: LayerRule(operator="attention", weight_bits=4), "attention has no weights"),
    "rules in a list": (lambda: QDiffConfig(rules=[]), r"rules=\[\]: want a tuple of LayerRule"),  # type: ignore[arg-type]
    "a slack above one": (lambda: QDiffConfig(weight_slack=6), r"weight_slack=6: want a share in 0\.\.1"),
    "an unknown field": (lambda: QDiffConfig.from_dict({"bits": 4}), r"unknown config fields \['bits'\]"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_make_no_sense(name: str) -> None:
    make, message = CONFIGS[name]
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_preset_name_where_a_config_is_wanted(sketch: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"config is a str: want a QDiffConfig, e\.g\. QDiffConfig\.preset\('w4a8'\)"):
        qdiff_fx.prepare(sketch, "w4a8", example_inputs=sketch_inputs())  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["weight_observer", "activation_observer"])
def test_an_unknown_observer(preparer: Preparer, sketch: nn.Module, field: str) -> None:
    config = QDiffConfig.preset("w4a8", **{field: "median"})
    with pytest.raises(ConfigError, match="observer 'median': want one of minmax"):
        preparer(sketch, config, example_inputs=sketch_inputs())


@pytest.mark.parametrize("verb", ["convert", "calibrate"])
def test_the_original_module_where_a_prepared_one_is_wanted(sketch: nn.Module, verb: str) -> None:
    arguments = (sketch,) if verb == "convert" else (sketch, [])
    with pytest.raises(ConversionError, match=rf"{verb}\(\) takes what prepare\(\) returned, got a Sketch; call"):
        getattr(qdiff_fx, verb)(*arguments)


def test_stages_out_of_order(preparer: Preparer, sketch: nn.Module) -> None:
    prepared = preparer.fitted(sketch)
    with pytest.raises(InputError, match="this model is prepared already"):
        qdiff_fx.prepare(prepared)
    quantized = qdiff_fx.convert(prepared, backend="reference")
    with pytest.raises(InputError, match="this model is quantized already"):
        qdiff_fx.prepare(quantized)
    for verb, arguments in (("convert", ()), ("calibrate", ([],))):
        with pytest.raises(ConversionError, match=rf"{verb}\(\) .* this model is converted already"):
            getattr(qdiff_fx, verb)(quantized, *arguments)
    qdiff_fx.convert(prepared, backend="reference", release=True)
    with pytest.raises(ConversionError, match=r"consumed by convert\(release=True\); prepare it again"):
        qdiff_fx.convert(prepared)


def test_unknown_and_unavailable_backends(
    preparer: Preparer, sketch: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = preparer.fitted(sketch)
    with pytest.raises(BackendError, match=r"backend 'tpu': want auto, .*reference"):
        qdiff_fx.convert(prepared, backend="tpu")
    lame = Backend(name="lame", unavailable=lambda device: "this machine has no such unit")
    monkeypatch.setattr(kernels, "BACKENDS", {**BACKENDS, "lame": lame})
    with pytest.raises(BackendError, match="backend 'lame' cannot run here: this machine has no such unit"):
        qdiff_fx.convert(prepared, backend="lame")
    with pytest.raises(BackendError):
        qdiff_fx.convert(prepared, backend="lame", release=True)
    assert prepared.qdiff_stage == "prepared", "a refused conversion must not consume the model"
    qdiff_fx.convert(prepared, backend="reference")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(sketch: nn.Module, value: float) -> None:
    broken = copy.deepcopy(sketch)
    with torch.no_grad():
        broken.wide.weight[3, 1, 0, 2] = value
    with pytest.raises(NonFiniteError, match=r"wide\.weight holds NaN or infinity; repair the model"):
        qdiff_fx.prepare(broken, example_inputs=sketch_inputs())


def test_weights_that_turn_nan_behind_prepare(sketch: nn.Module) -> None:
    broken = copy.deepcopy(sketch)
    prepared = qdiff_fx.prepare(broken, QDiffConfig.preset("w4a32", **PLAIN), example_inputs=sketch_inputs())
    with torch.no_grad():
        broken.wide.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match="wide: its weight holds NaN"):
        qdiff_fx.convert(prepared, backend="reference")


@pytest.mark.parametrize(
    ("preset", "value", "layer"),
    [
        ("w4a8", torch.nan, "stem"),
        ("w4a8", torch.inf, "stem"),
        ("w4a32", torch.nan, "stem"),
        ("w4a8", 1e30, "scaled_dot_product_attention"),
    ],
)
def test_activations_that_are_not_finite_name_the_layer_that_made_them(
    preparer: Preparer, sketch: nn.Module, preset: str, value: float, layer: str
) -> None:
    prepared = preparer(sketch, QDiffConfig.preset(preset, **PLAIN), example_inputs=sketch_inputs())
    calls = calls_of(sketch)
    calls[1][0][0][2, 1, 3, 3] = value
    named = rf"the full-precision network at timestep 500: {layer} \(node \w+\) is the first to make NaN or infinity"
    with pytest.raises(NonFiniteError, match=named) as caught:
        qdiff_fx.calibrate(prepared, calls, progress=False)
    assert "\n" not in str(caught.value)


def test_a_quality_measurement_that_is_not_finite_names_network_and_layer(
    preparer: Preparer, sketch: nn.Module
) -> None:
    prepared = preparer.fitted(sketch)
    calls = calls_of(sketch)
    broken = CalibrationSet.from_samples([((torch.full_like(args[0], torch.nan), args[1]), {}) for args, _ in calls])
    with pytest.raises(NonFiniteError, match=r"the full-precision network at timestep 0: stem \(node"):
        measure_quality(prepared, broken)
    quantizer = next(item for item in prepared.modules() if isinstance(item, WeightQuantizer) and item.name == "down")
    quantizer.scale = torch.full_like(quantizer.scale, torch.inf)
    with pytest.raises(NonFiniteError, match=r"the quantized network at timestep 0: down \(node"):
        measure_quality(prepared, CalibrationSet.from_samples(calls))


def test_operands_of_attentions_that_are_not_finite_name_the_layer(preparer: Preparer, sketch: nn.Module) -> None:
    prepared = preparer(sketch, QDiffConfig(), example_inputs=sketch_inputs())
    calls = calls_of(sketch)
    calls[1][0][0][:] = torch.nan
    with pytest.raises(NonFiniteError, match=r"stem \(node \w+\) is the first to make NaN or infinity"):
        qdiff_fx.calibrate(prepared, calls, progress=False)


def test_a_module_that_cannot_be_captured_is_named() -> None:
    class Branching(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample if timestep.max() > 5 else -sample

    with pytest.raises(CaptureError, match=r"Branching: torch\.export cannot capture it"):
        qdiff_fx.prepare(Branching().eval(), example_inputs=(torch.zeros(2, 1, 4, 4), torch.zeros(2)))
