"""Every layer and attention gets a policy: the config's, a structural default, or the last rule that matches."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pass_checks import PassRun, run_pass
from qdiff_fx.config import LayerRule, QDiffConfig
from qdiff_fx.errors import QDiffWarning
from qdiff_fx.graph.edit import shared_copy
from qdiff_fx.graph.meta import ATTENTION, LAYER, AttentionPolicy, LayerPolicy
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.prepare.annotate import AnnotatePolicies
from qdiff_fx.passes.prepare.split_shortcuts import SplitShortcuts
from subjects import Preparer, sketch_inputs

BOUNDARY = (8, None)


def _annotate(preparer: Preparer, sketch: nn.Module, preset: str = "w4a8", **changes: Any) -> dict[str, Any]:
    """Policies of the sketch by name."""
    captured = preparer.capture(sketch, sketch_inputs(), None)
    graph_module = shared_copy(captured.graph_module)
    context = PassContext(config=QDiffConfig.preset(preset, **changes), signature=captured.signature)
    SplitShortcuts().run(graph_module, context)
    assert AnnotatePolicies().run(graph_module, context).modified
    assert not AnnotatePolicies().run(graph_module, context).modified
    policies = [LAYER.get(node) or ATTENTION.get(node) for node in graph_module.graph.nodes]
    return {policy.name: policy for policy in policies if policy is not None}


def _bits(policy: LayerPolicy) -> tuple[int | None, int | None]:
    return policy.weight.bits if policy.weight else None, policy.activation.bits if policy.activation else None


def _attention(policies: dict[str, Any]) -> AttentionPolicy:
    (found,) = [policy for policy in policies.values() if isinstance(policy, AttentionPolicy)]
    return found


def test_structural_defaults_guard_the_sample_the_output_and_the_noise_level(
    preparer: Preparer, sketch: nn.Module
) -> None:
    policies = _annotate(preparer, sketch)
    seen = {name: (*_bits(item), item.reason) for name, item in policies.items() if isinstance(item, LayerPolicy)}
    assert seen == {
        "embed": (8, 8, "embeds the noise level"),
        "stem": (*BOUNDARY, "boundary: reads the noisy sample"),
        "wide": (4, 8, "config"),
        "down": (4, 8, "config"),
        "qkv": (4, 8, "config"),
        "project": (4, 8, "config"),
        "skip#0": (4, 8, "config"),
        "skip#1": (4, 8, "config"),
        "head": (*BOUNDARY, "boundary: makes the output"),
    }


def test_quantize_boundaries_gives_every_layer_the_configs_bits(preparer: Preparer, sketch: nn.Module) -> None:
    policies = _annotate(preparer, sketch, quantize_boundaries=True)
    assert {_bits(item) for item in policies.values() if isinstance(item, LayerPolicy)} == {(4, 8)}


@pytest.mark.parametrize(("preset", "weight"), [("w8a32", 8), ("w4a32", 4)])
def test_carrier_presets_quantize_weights_alone(
    preparer: Preparer, sketch: nn.Module, preset: str, weight: int
) -> None:
    policies = _annotate(preparer, sketch, preset)
    layers = {name: _bits(item) for name, item in policies.items() if isinstance(item, LayerPolicy)}
    assert {activation for _, activation in layers.values()} == {None}
    assert layers["wide"] == (weight, None) and layers["stem"] == layers["embed"] == (8, None)
    attention = _attention(policies)
    assert attention.query_key_value is None and attention.probabilities is None


def test_eight_bit_weights_are_symmetric_and_narrower_ones_are_not(preparer: Preparer, sketch: nn.Module) -> None:
    policies = _annotate(preparer, sketch)
    eight, four = policies["stem"].weight, policies["wide"].weight
    assert (eight.qmin, eight.qmax, eight.symmetric, eight.per_channel) == (-127, 127, True, True)
    assert (four.qmin, four.qmax, four.symmetric, four.per_channel) == (0, 15, False, True)


def test_attention_takes_its_own_widths(preparer: Preparer, sketch: nn.Module) -> None:
    attention = _attention(_annotate(preparer, sketch))
    assert attention.query_key_value is not None and attention.query_key_value.bits == 8
    assert attention.probabilities is not None
    assert (attention.probabilities.qmin, attention.probabilities.qmax, attention.probabilities.symmetric) == (
        0,
        255,
        True,
    )
    attention = _attention(_annotate(preparer, sketch, attention_bits=6, softmax_bits=5))
    assert attention.query_key_value is not None and attention.query_key_value.bits == 6
    assert attention.probabilities is not None and attention.probabilities.bits == 5


def test_rules_match_by_glob_and_by_operator_and_the_last_wins(preparer: Preparer, sketch: nn.Module) -> None:
    rules = (
        LayerRule(operator="conv2d", weight_bits=6),
        LayerRule(module="s*", weight_bits=5, activation_bits=7),
        LayerRule(module="skip", operator="conv2d", activation_bits=4),
        LayerRule(operator="attention", activation_bits=32),
    )
    policies = _annotate(preparer, sketch, rules=rules)
    assert _bits(policies["wide"]) == (6, 8) and _bits(policies["qkv"]) == (4, 8)
    assert _bits(policies["stem"]) == (5, 7), "a rule wins over the boundary"
    assert _bits(policies["skip#0"]) == _bits(policies["skip#1"]) == (5, 4)
    assert _attention(policies).query_key_value is None and _attention(policies).probabilities is None
    assert policies["wide"].reason == "rule * conv2d" and policies["skip#0"].reason == "rule skip conv2d"


def test_a_floating_weight_makes_its_input_floating(preparer: Preparer, sketch: nn.Module) -> None:
    policies = _annotate(preparer, sketch, rules=(LayerRule(module="wide", weight_bits=32),))
    assert _bits(policies["wide"]) == (None, None)


def test_a_rule_that_matches_nothing_warns_with_its_text(preparer: Preparer, sketch: nn.Module) -> None:
    rules = (LayerRule(module="down_blocks.*", weight_bits=8), LayerRule(module="wide", weight_bits=8))
    with pytest.warns(QDiffWarning, match=r"LayerRule\(module='down_blocks\.\*', .*\) matches no layer") as caught:
        preparer(sketch, QDiffConfig(rules=rules), example_inputs=sketch_inputs())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preparer(sketch, QDiffConfig(rules=rules[1:]), example_inputs=sketch_inputs())


class Boundary(nn.Module):
    """How the sample may reach the first layers and the last ones the output."""

    def __init__(self) -> None:
        super().__init__()
        self.padded, self.joined, self.cut = nn.Conv2d(4, 4, 3), nn.Conv2d(5, 4, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.patches = nn.Linear(16, 4)
        self.behind = nn.Conv2d(4, 4, 1)
        self.out = nn.Conv2d(4, 4, 1)

    def forward(self, sample: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        scaled = 2 * sample / 1.5 - 0.25
        h = self.padded(functional.pad(scaled, (1, 1, 1, 1)))
        h = h + self.joined(torch.cat([scaled, mask], dim=1)) + self.cut(sample[:, :2].contiguous())
        tokens = functional.pixel_unshuffle(sample, 2).permute(0, 2, 3, 1)
        h = h + functional.interpolate(self.patches(tokens).permute(0, 3, 1, 2), scale_factor=2.0)
        return self.out(functional.silu(self.behind(h * timestep[:, None, None, None]))) * 0.5


def _of_module(module: nn.Module, *inputs: Tensor, **options: Any) -> PassRun:
    return run_pass(AnnotatePolicies(), module, inputs, **options)


def test_the_boundary_is_found_through_pads_cats_slices_patches_and_scaling() -> None:
    inputs = (torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 1, 8, 8))
    run = _of_module(Boundary(), *inputs)
    reasons = {policy.name: policy.reason for node in run.nodes if (policy := LAYER.get(node))}
    first = "boundary: reads the noisy sample"
    assert reasons == {
        "padded": first,
        "joined": first,
        "cut": first,
        "patches": first,
        "behind": "config",
        "out": "boundary: makes the output",
    }


def test_another_sample_input_moves_the_boundary() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)

        def forward(self, picture: Tensor, sample: Tensor) -> Tensor:
            return self.out(self.a(picture).sin() + self.b(sample).sin())

    inputs = (torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4))
    for name, layer in ((None, "a"), ("sample", "b")):
        run = _of_module(Two(), *inputs, sample_input=name)
        guarded = [policy.name for node in run.nodes if (policy := LAYER.get(node)) and "reads" in policy.reason]
        assert guarded == [layer]


def test_every_layer_of_a_sum_that_makes_the_output_through_a_split_is_guarded() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(1, 4, 1), nn.Conv2d(8, 1, 1)

        def forward(self, sample: Tensor) -> Tensor:
            h = self.stem(sample)
            return self.head(torch.cat([h, h.sin()], dim=1))

    run = _of_module(Head(), torch.randn(2, 1, 4, 4), before=(SplitShortcuts(),))
    reasons = {policy.name: policy.reason for node in run.nodes if (policy := LAYER.get(node))}
    assert reasons["head#0"] == reasons["head#1"] == "boundary: makes the output"


def test_a_module_called_twice_gets_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, sample: Tensor) -> Tensor:
            return self.conv(self.conv(self.conv(sample)).sin()).sin()

    run = _of_module(Twice(), torch.randn(2, 2, 4, 4))
    assert [policy.name for node in run.nodes if (policy := LAYER.get(node))] == ["conv", "conv@1", "conv@2"]


class Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.computed = nn.Conv2d(2, 2, 1)
        self.uneven = nn.Conv2d(2, 2, 2, padding="same")
        self.even = nn.Conv2d(2, 2, 3, padding="same")
        self.transposed = nn.ConvTranspose2d(2, 2, 1)

    def forward(self, sample: Tensor) -> Tensor:
        h = functional.conv2d(sample, self.computed.weight / self.computed.weight.norm())
        return self.transposed(self.even(self.uneven(h)))


def test_layers_that_cannot_be_quantized_are_left_alone_with_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'", UserWarning)
        run = _of_module(Refused(), torch.randn(2, 2, 8, 8))
    assert run.reasons == [
        "its weight is computed in the graph",
        'padding="same" with an even kernel pads unevenly',
    ]
    assert [policy.name for node in run.nodes if (policy := LAYER.get(node))] == ["even"]
