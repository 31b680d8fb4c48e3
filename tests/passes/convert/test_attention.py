"""A calibrated attention becomes one operator that computes the same, with its grids as constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qdiff_fx
from qdiff_fx.fake_quantize import QuantizerMode

sdpa = functional.scaled_dot_product_attention


class Attention(nn.Module):
    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return self.attend(query, key, value, mask)


ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda q, k, v, mask: sdpa(q, k, v),
    "mask": lambda q, k, v, mask: sdpa(q, k, v, mask),
    "boolean mask": lambda q, k, v, mask: sdpa(q, k, v, mask > -1),
    "scale": lambda q, k, v, mask: sdpa(q, k, v, scale=0.2),
    "causal": lambda q, k, v, mask: sdpa(q, k, v, is_causal=True),
}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_operator_equals_the_simulation_bit_for_bit(name: str, bits: int) -> None:
    inputs = (torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), torch.rand(2, 1, 5, 7) - 0.5)
    module = Attention(ATTENTIONS[name]).eval()
    prepared = qdiff_fx.prepare(module, qdiff_fx.QDiffConfig(attention_bits=bits), example_inputs=inputs)
    with torch.no_grad():
        prepared(*inputs)
        quantized = qdiff_fx.convert(prepared, backend="reference")
        seen = quantized(*inputs)
        assert torch.equal(seen, prepared.set_mode(QuantizerMode.QUANTIZE)(*inputs))
        error = (seen - module(*inputs)).abs().max()
    (node,) = [item for item in quantized.plan.graph.nodes if item.target is torch.ops.qdiff.attention.default]
    assert node.args[8:] == (bits, 8) and len(node.args[6]) == len(node.args[7]) == 3
    # Values lie in [-4, 4]: a step of 8 / (2^bits - 1) in each operand, scores of four products.
    assert 0 < error < 8 / (2**bits - 1) * 4


@pytest.mark.parametrize(
    ("config", "scales", "softmax"), [({"softmax_bits": 32}, 3, 0), ({"attention_bits": 32}, 0, 0)]
)
def test_operands_in_the_carrier_type_have_no_grid(config: dict[str, Any], scales: int, softmax: int) -> None:
    inputs = tuple(torch.randn(2, 3, 5, 4) for _ in range(3))
    module = Attention(ATTENTIONS["plain"]).eval()
    inputs = (*inputs, torch.zeros(2, 1, 5, 5))
    prepared = qdiff_fx.prepare(module, qdiff_fx.QDiffConfig(**config), example_inputs=inputs)
    with torch.no_grad():
        prepared(*inputs)
    plan = qdiff_fx.convert(prepared, backend="reference").plan
    nodes = [item for item in plan.graph.nodes if item.target is torch.ops.qdiff.attention.default]
    assert len(nodes) == (1 if scales else 0)
    assert all(len(node.args[6]) == scales and node.args[9] == softmax for node in nodes)
