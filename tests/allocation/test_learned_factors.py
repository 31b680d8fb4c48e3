"""Learning from the best closed-form factor on: kept only where it wins, and the same again with the same seed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import qdiff_fx
from qdiff_fx.allocation import factor_search
from qdiff_fx.allocation.channel_factors import choose_channel_factors, input_nodes, readers_of
from qdiff_fx.allocation.factor_search import search_factor
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.errors import ConfigError
from qdiff_fx.fake_quantize import ActivationQuantizer
from qdiff_fx.model import PreparedUNet


def _tensors(prepared: PreparedUNet, data: CalibrationSet) -> list[tuple[ActivationQuantizer, Any, torch.Tensor]]:
    """Every quantized tensor of the network that can take a factor, with its readers and its values."""
    found: list[tuple[ActivationQuantizer, Any, torch.Tensor]] = []
    handles = []
    for node in input_nodes(prepared.graph_module):
        quantizer, readers = (
            prepared.graph_module.get_submodule(str(node.target)),
            readers_of(prepared.graph_module, node),
        )
        assert isinstance(quantizer, ActivationQuantizer)
        if readers:
            handles.append(
                quantizer.register_forward_hook(
                    lambda module, args, _, readers=readers: found.append((module, readers, args[0].detach()))
                )
            )
    args, kwargs = data.gather(range(32))
    with torch.no_grad():
        prepared(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


def test_learning_never_ends_worse_and_lowers_the_error_somewhere(prepared: PreparedUNet, data: CalibrationSet) -> None:
    learned = 0
    for quantizer, readers, x in _tensors(prepared, data)[:6]:
        plain, refined = (search_factor(quantizer, x, readers, iterations=count) for count in (0, 30))
        assert refined.errors.score <= plain.errors.score
        if refined.candidate is not None and refined.candidate.learned:
            assert refined.errors.score < plain.errors.score
            factor = refined.candidate.factor
            assert bool((factor > 0).all()) and torch.log(factor).mean().abs() < 1e-4
            learned += 1
    assert learned > 0


def test_what_loses_is_dropped(prepared: PreparedUNet, data: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, readers, x = _tensors(prepared, data)[0]
    plain = search_factor(quantizer, x, readers)

    def absurd(factor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return torch.exp(8.0 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(0)))

    monkeypatch.setattr(factor_search, "refine_factor", absurd)
    kept = search_factor(quantizer, x, readers, iterations=1)
    assert kept.errors == plain.errors and not (kept.candidate is not None and kept.candidate.learned)


def test_the_stage_is_off_by_default_and_reproducible(prepared: PreparedUNet, data: CalibrationSet) -> None:
    assert qdiff_fx.QDiffConfig().factor_iterations == 0
    with pytest.raises(ConfigError, match="factor_iterations=-1: want a whole number"):
        qdiff_fx.QDiffConfig(factor_iterations=-1)
    twins = [copy.deepcopy(prepared) for _ in range(2)]
    choices = [
        choose_channel_factors(twin.graph_module, twin.signature, data, iterations=5, samples=16) for twin in twins
    ]
    assert choices[0] == choices[1]
    assert any(choice.learned for choice in choices[0])
