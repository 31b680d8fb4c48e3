"""Channel factors are never worse than none on the samples that they were chosen on, as the installed grids say."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn

from qdiff_fx.allocation.channel_factors import readers_of
from qdiff_fx.allocation.factor_search import search_factor
from qdiff_fx.fake_quantize import ActivationQuantizer, NoiseLevel, QuantizerMode, WeightQuantizer, set_mode
from qdiff_fx.numerics.spec import QuantSpec

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A small layer and what it reads; channels in `silent` are zero in every sample, those in `loud` large."""

    kind: str
    groups: int
    weight_bits: int
    channels: int
    silent: frozenset[int]
    loud: frozenset[int]
    seed: int


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    kind = draw(st.sampled_from(["conv", "linear"]))
    groups = draw(st.sampled_from([1, 2])) if kind == "conv" else 1
    channels = groups * draw(st.integers(2, 5))
    some = st.frozensets(st.integers(0, channels - 1), max_size=channels - 1)
    return Layer(
        kind=kind,
        groups=groups,
        weight_bits=draw(st.sampled_from([4, 8])),
        channels=channels,
        silent=draw(some),
        loud=draw(some),
        seed=draw(st.integers(0, 99)),
    )


def build(layer: Layer) -> tuple[fx.GraphModule, Tensor]:
    generator = torch.Generator().manual_seed(layer.seed)
    conv = layer.kind == "conv"
    x = torch.randn(4, layer.channels, 5, 5, generator=generator)
    x[:, list(layer.loud)] *= 100.0
    x[:, list(layer.silent)] = 0.0
    weight = torch.randn(6, layer.channels // layer.groups, *((3, 3) if conv else ()), generator=generator)
    graph, root = fx.Graph(), nn.Module()
    root.register_buffer("weight", weight)
    noise_level = NoiseLevel()
    root.input = ActivationQuantizer(
        "input", QuantSpec(bits=8), observer="mse", channel_axis=1 if conv else -1, noise_level=noise_level
    )
    whole = layer.weight_bits == 8
    spec = QuantSpec(bits=layer.weight_bits, signed=whole, symmetric=whole, narrow=whole, per_channel=True)
    root.rounded = WeightQuantizer("weight", spec, observer="mse", groups=layer.groups)
    read = graph.call_module("input", (graph.placeholder("x"),))
    rounded = graph.call_module("rounded", (graph.get_attr("weight"),))
    geometry = ([1, 1], [1, 1], [1, 1], layer.groups) if conv else ()
    target = aten.conv2d.default if conv else aten.linear.default
    graph.output(graph.call_function(target, (read, rounded, None, *geometry)))
    return fx.GraphModule(root, graph), x if conv else x.permute(0, 2, 3, 1).contiguous()


def relative_error(module: fx.GraphModule, x: Tensor) -> float:
    """Of the layer as its quantizers stand, mean over the samples."""
    set_mode(module, QuantizerMode.PASS)
    wanted = module(x).double().flatten(1)
    set_mode(module, QuantizerMode.QUANTIZE)
    error = module(x).double().flatten(1) - wanted
    return float((error.square().sum(1) / wanted.square().sum(1)).mean())


@settings(max_examples=30)
@given(layer=layers())
@torch.no_grad()
def test_factors_are_never_worse_than_none(layer: Layer) -> None:
    module, x = build(layer)
    if not x.abs().any():
        return
    set_mode(module, QuantizerMode.OBSERVE)
    module(x)
    quantizer, weight = module.input, module.rounded
    quantizer.fit()
    weight.fit(module.weight)
    off = relative_error(module, x)
    node = next(node for node in module.graph.nodes if node.target == "input")
    readers = readers_of(module, node)
    assert len(readers) == 1
    found = search_factor(quantizer, x, readers)
    found.install(quantizer, readers)
    assert relative_error(module, x) <= off * (1 + 1e-9)
    for factor in (quantizer.channel_factor, weight.channel_factor):
        assert (factor is None) == (found.candidate is None)
        assert factor is None or bool((factor > 0).all() and torch.isfinite(factor).all())
