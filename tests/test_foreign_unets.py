"""UNets that were written without diffusers: found by structure, quantized whole, close to full precision."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import qdiff_fx
from foreign.ddpm_style import DdpmUNet
from foreign.guided_style import GuidedUNet
from qdiff_fx.graph.meta import ATTENTION, BLOCK, LAYER, SPLIT_PART
from subjects import ForeignNet, signal_to_noise

KINDS = pytest.mark.parametrize("kind", [DdpmUNet, GuidedUNet])


@KINDS
def test_shortcuts_attentions_layers_and_blocks_are_found(kind: type[nn.Module], foreign: Any) -> None:
    graph = foreign(kind).prepared.graph_module.graph
    parts = [part for node in graph.nodes if (part := SPLIT_PART.get(node))]
    assert Counter(part.index for part in parts) == {0: 3, 1: 3}
    assert [(part.start, part.stop) for part in parts] == [(0, 16), (16, 32), (0, 16), (16, 24), (0, 8), (8, 16)]
    assert sum(ATTENTION.get(node) is not None for node in graph.nodes) == 3
    layers = [policy for node in graph.nodes if (policy := LAYER.get(node))]
    modules = [child for child in foreign(kind).net.modules() if isinstance(child, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    assert len(layers) == len(modules) + 3, "every layer of the module once, three of them in two parts"
    operators = Counter(type(child).__name__.lower() for child in modules)
    assert Counter(policy.operator for policy in layers) == operators + Counter(conv2d=3)
    assert len({BLOCK.get(node) for node in graph.nodes if LAYER.get(node)}) == 16


@KINDS
def test_the_boundary_and_the_time_embedding_are_guarded(kind: type[nn.Module], foreign: Any) -> None:
    graph = foreign(kind).prepared.graph_module.graph
    reasons = {policy.name: policy.reason for node in graph.nodes if (policy := LAYER.get(node))}
    first, last = ("conv_in", "conv_out") if kind is DdpmUNet else ("stem", "out.2")
    assert reasons[first] == "boundary: reads the noisy sample" and reasons[last] == "boundary: makes the output"
    embedding = {name for name, reason in reasons.items() if reason == "embeds the noise level"}
    wanted = "dense." if kind is DdpmUNet else "time_embed."
    assert len({name for name in embedding if name.startswith(wanted)}) == 2
    assert all("temb_proj" in name or "emb_layers" in name or name.startswith(wanted) for name in embedding)


@KINDS
def test_prepared_equals_the_module_up_to_rounding(kind: type[nn.Module], foreign: Any) -> None:
    subject: ForeignNet = foreign(kind)
    args, kwargs = subject.calls[1]
    with torch.no_grad():
        assert signal_to_noise(subject.net(*args, **kwargs), copy.deepcopy(subject.prepared)(*args, **kwargs)) > 110


@KINDS
def test_prepare_calibrate_convert_stays_close_to_full_precision(kind: type[nn.Module], foreign: Any) -> None:
    subject: ForeignNet = foreign(kind)
    prepared = copy.deepcopy(subject.prepared)
    report = qdiff_fx.calibrate(prepared, subject.calls, progress=False)
    assert report.timesteps == (0.0, 500.0, 999.0)
    quantized = qdiff_fx.convert(prepared, backend="reference")
    with torch.no_grad():
        for args, kwargs in subject.calls:
            wanted = subject.net(*args, **kwargs)
            # 4-bit weights: each rounds off 1/15 of its channel's range at most, 10 dB and more after 16 layers.
            assert signal_to_noise(wanted, quantized(*args, **kwargs)) > 10
    rows = Counter(row.kernel for row in quantized.lowering_report().rows)
    assert rows["qdiff.attention"] == 3 and rows["aten.conv2d on dequantized weight"] == 2
    assert sum(rows.values()) == len(report.layers) + 3
