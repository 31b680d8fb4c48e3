"""convert(release=True) frees each floating weight as it is packed; without it nothing of the prepared model goes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

import qdiff_fx
from qdiff_fx.passes.convert import layers
from subjects import PLAIN, Sketch, sketch_inputs

OBSERVERS: dict[str, Any] = {"weight_observer": "minmax", "activation_observer": "minmax"}


def _observed() -> tuple[qdiff_fx.PreparedUNet, list[weakref.ref[torch.Tensor]]]:
    """A prepared model, alone with its weights, and what tells whether they are alive."""
    net: nn.Module = Sketch().eval()
    config = qdiff_fx.QDiffConfig.preset("w4a8", **PLAIN, **OBSERVERS)
    prepared = qdiff_fx.prepare(net, config, example_inputs=sketch_inputs())
    with torch.no_grad():
        prepared(*sketch_inputs())
    weights = [weakref.ref(item) for item in prepared.graph_module.parameters() if item.dim() > 1]
    return prepared, weights


def _alive_at_each_layer(monkeypatch: pytest.MonkeyPatch, *, release: bool) -> list[int]:
    prepared, weights = _observed()
    counts: list[int] = []
    store = layers._store_weight

    def counted(*args: Any, **options: Any) -> Any:
        counts.append(sum(weight() is not None for weight in weights))
        return store(*args, **options)

    monkeypatch.setattr(layers, "_store_weight", counted)
    quantized = qdiff_fx.convert(prepared, backend="reference", release=release)
    counts.append(sum(weight() is not None for weight in weights))
    assert not [name for name, item in quantized.plan.named_parameters() if item.dim() > 1]
    return counts


def test_released_weights_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = _alive_at_each_layer(monkeypatch, release=True)
    layers_and_end = 10  # two of the nine layers are parts of one
    assert counts[:-1] == [counts[0] - index for index in range(layers_and_end - 1)]
    assert counts[-1] == 0


def test_kept_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = _alive_at_each_layer(monkeypatch, release=False)
    assert len(set(counts)) == 1
