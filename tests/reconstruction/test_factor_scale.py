"""Channel factors are a direction: doubling all of them is another name for the same integers and learned steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qdiff_fx
from qdiff_fx.allocation.channel_factors import input_nodes, readers_of
from qdiff_fx.calibration.driver import activation_quantizers
from qdiff_fx.fake_quantize import ActivationQuantizer
from qdiff_fx.graph.edit import get_tensor
from qdiff_fx.numerics.affine import QParams
from qdiff_fx.reconstruction import BlockResult

qdiff = torch.ops.qdiff


def with_factors(prepared: qdiff_fx.PreparedUNet, power: int) -> qdiff_fx.PreparedUNet:
    """A copy with random factors times 2^power, whose activation steps are as much smaller."""
    result = copy.deepcopy(prepared)
    generator = torch.Generator().manual_seed(3)
    changed = 0
    for node in input_nodes(result.graph_module):
        quantizer = result.graph_module.get_submodule(str(node.target))
        readers = readers_of(result.graph_module, node)
        if not readers:
            continue
        assert isinstance(quantizer, ActivationQuantizer)
        channels = readers[0].weight.shape[1] * readers[0].call.groups
        factor = torch.exp(torch.randn(channels, generator=generator) / 2) * 2.0**power
        quantizer.channel_factor = factor
        quantizer.set_qparams(QParams(quantizer.scale * 2.0**-power, quantizer.zero_point))
        for reader in readers:
            reader.quantizer.channel_factor = factor
            reader.quantizer.fit(reader.weight)
        changed += 1
    assert changed > 3
    return result


def numbers(prepared: qdiff_fx.PreparedUNet) -> dict[str, Tensor]:
    """What an integer layer computes with: codes of its weight, and what a sum and an input's code are worth."""
    plan = qdiff_fx.convert(prepared, backend="reference").plan
    found: dict[str, Tensor] = {}
    for node in plan.graph.nodes:
        if node.target in (qdiff.quantize.default, qdiff.conv2d.default, qdiff.linear.default):
            tensors = [
                get_tensor(plan, item.target) for item in node.args[1:6] if getattr(item, "op", "") == "get_attr"
            ]
            if node.target is not qdiff.quantize.default:
                tensors[1] = tensors[1].double() * node.args[6]
            found |= {f"{node.name} {index}": value for index, value in enumerate(tensors)}
    return found


@pytest.mark.parametrize("power", [1, -3])
def test_a_power_of_two_on_all_factors_changes_no_integer(calibrated: qdiff_fx.PreparedUNet, power: int) -> None:
    plain, scaled = (numbers(with_factors(calibrated, item)) for item in (0, power))
    assert any(value.dtype == torch.uint8 for value in plain.values())
    assert any(name.startswith("quantize") and value.ndim == 1 for name, value in plain.items())
    assert plain.keys() == scaled.keys()
    assert [name for name in plain if not torch.equal(plain[name], scaled[name])] == []


def test_a_power_of_two_on_all_factors_changes_no_learned_step(
    calibrated: qdiff_fx.PreparedUNet, run: Callable[..., tuple[BlockResult, ...]]
) -> None:
    learned: list[Any] = []
    for power in (0, 2):
        prepared = with_factors(calibrated, power)
        before = [float(item.scale) for _, item in activation_quantizers(prepared.graph_module)]
        results = run(prepared, weight_iterations=0)
        after = [float(item.scale) for _, item in activation_quantizers(prepared.graph_module)]
        assert any(result.kept and result.phase == "activations" for result in results) and before != after
        learned.append(([a / b for a, b in zip(after, before, strict=True)], [r.learned_loss for r in results]))
    assert learned[0] == learned[1]
