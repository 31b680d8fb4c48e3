"""Every layer of a converted graph gives what the fake-quantized layer gives on the same input.

End to end the two drift apart, because a chain of quantizers amplifies the last bit of every sum; node by node they
must agree up to the rounding of float32 sums.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qdiff_fx
from node_by_node import largest_errors
from qdiff_fx.errors import PatternError
from qdiff_fx.fake_quantize import ActivationQuantizer, WeightQuantizer
from qdiff_fx.graph.edit import get_tensor, layer_call
from qdiff_fx.graph.meta import LAYER
from subjects import Preparer, Sketch, calls_of

FLOAT32 = 1e-5
BFLOAT16 = 2.0**-6
"""The simulation rounds x and W to 8 significant bits before it multiplies (2^-9 each), its output too, and the sum."""


@pytest.fixture(scope="module")
def sketch_bfloat16() -> nn.Module:
    torch.manual_seed(0)
    return Sketch().eval().to(torch.bfloat16)


def _errors(prepared: qdiff_fx.PreparedUNet, module: nn.Module) -> dict[str, float]:
    quantized = qdiff_fx.convert(prepared, backend="reference")
    args, kwargs = calls_of(module)[1]
    return largest_errors(prepared.graph_module, quantized.plan, prepared.signature.flatten(args, kwargs))


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4a4", "w8a32", "w4a32"])
@pytest.mark.parametrize("carrier", ["float32", "bfloat16"])
def test_every_layer_kind_agrees(
    preparer: Preparer, sketch: nn.Module, sketch_bfloat16: nn.Module, preset: str, carrier: str
) -> None:
    module = sketch if carrier == "float32" else sketch_bfloat16
    errors = _errors(preparer.fitted(module, preset), module)
    names = {"embed", "stem", "wide", "down", "qkv", "project", "skip#0", "skip#1", "head"}
    assert names <= errors.keys() and len(errors) == len(names) + (0 if preset.endswith("a32") else 1)
    limit = FLOAT32 if carrier == "float32" else BFLOAT16
    assert {name: error for name, error in errors.items() if error > limit} == {}


@pytest.mark.parametrize("name", ["unconditional", "conditional"])
def test_every_layer_of_a_diffusers_unet_agrees(preparer: Preparer, name: str, request: pytest.FixtureRequest) -> None:
    unet = request.getfixturevalue(name)
    errors = _errors(preparer.fitted(unet), unet)
    assert len(errors) > 50 and {name: error for name, error in errors.items() if error > FLOAT32} == {}


def test_quantized_boundaries_agree(preparer: Preparer, sketch: nn.Module) -> None:
    errors = _errors(preparer.fitted(sketch, quantize_boundaries=True), sketch)
    assert max(errors.values()) < FLOAT32


@pytest.mark.parametrize(
    ("preset", "shifted"),
    # An 8-bit weight has no room for a shift.
    [("w8a8", False), ("w4a8", False), ("w4a8", True), ("w4a4", False), ("w4a4", True)],
)
@pytest.mark.parametrize("carrier", ["float32", "bfloat16"])
def test_channel_factors_and_shifts_agree(
    preparer: Preparer, sketch: nn.Module, sketch_bfloat16: nn.Module, preset: str, shifted: bool, carrier: str
) -> None:
    module = sketch if carrier == "float32" else sketch_bfloat16
    prepared = preparer.fitted(module, preset)
    plain = _errors(prepared, module)
    assert _give_factors(prepared, shifted=shifted) >= 6
    errors = _errors(prepared, module)
    assert errors != plain
    assert {
        name: error for name, error in errors.items() if error > (FLOAT32 if carrier == "float32" else BFLOAT16)
    } == {}


def _give_factors(prepared: qdiff_fx.PreparedUNet, *, shifted: bool) -> int:
    """A factor and a shift for every input channel of every layer with an activation quantizer of its own."""
    graph_module = prepared.graph_module
    changed = 0
    for node in graph_module.graph.nodes:
        layer, policy = layer_call(node), LAYER.get(node)
        if layer is None or policy is None or policy.activation is None:
            continue
        activation = graph_module.get_submodule(str(layer.input.target))
        weight = graph_module.get_submodule(str(layer.weight.target))
        assert isinstance(activation, ActivationQuantizer) and isinstance(weight, WeightQuantizer)
        source = get_tensor(graph_module, layer.weight.args[0].target)  # type: ignore[union-attr]
        channels = source.shape[1] * layer.groups
        if activation.channel_factor is None:
            activation.channel_factor = torch.exp(torch.randn(channels) / 2)
        weight.channel_factor = activation.channel_factor
        if shifted and weight.spec.bits == 4:
            weight.channel_shift = torch.randint(0, 4, (channels,), dtype=torch.uint8)
        weight.fit(source)
        changed += 1
    return changed


def test_a_layer_computes_what_its_stored_numbers_say(preparer: Preparer, sketch: nn.Module) -> None:
    """Guards this file's helper: a wrong scale in the plan must show up."""
    prepared = preparer.fitted(sketch, "w4a8")
    quantized = qdiff_fx.convert(prepared, backend="reference")
    scale = get_tensor(quantized.plan, "wide.weight_scale")
    scale.mul_(1.001)
    args, kwargs = calls_of(sketch)[1]
    errors = largest_errors(prepared.graph_module, quantized.plan, prepared.signature.flatten(args, kwargs))
    assert errors["wide"] > FLOAT32 and errors["down"] < FLOAT32


def test_factors_without_an_input_quantizer_are_refused_not_dropped(preparer: Preparer, sketch: nn.Module) -> None:
    prepared = preparer.fitted(sketch, "w4a32")
    weight = prepared.graph_module.get_submodule("weight_quantizer_module_wide_weight")
    assert isinstance(weight, WeightQuantizer)
    weight.channel_factor = torch.ones(8)
    with pytest.raises(PatternError, match="wide: its weight has channel factors, its input has no quantizer"):
        qdiff_fx.convert(prepared, backend="reference")
