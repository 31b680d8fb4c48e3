"""Memory of a row is counted at the size of the call, and bounds how many rows a pass takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qdiff_fx.graph.capture import capture
from qdiff_fx.graph.memory import row_memory, rows_within


class _Chain(nn.Module):
    """Two convolutions; the first one's output lives until the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        first = self.wide(sample)
        return first + self.narrow(first.transpose(2, 3)).transpose(2, 3)


def test_bytes_are_those_of_the_tensors_that_live() -> None:
    captured = capture(_Chain().eval(), (torch.zeros(2, 2, 8, 8),))
    for batch, height, width in ((2, 8, 8), (5, 16, 8)):
        memory = row_memory(captured.graph_module, (torch.zeros(batch, 2, height, width),))
        sample, wide = 2 * height * width * 4, 16 * height * width * 4
        assert memory.largest == wide
        assert memory.saved == sample + 3 * wide  # first, narrow, sum; a transposed view is no tensor of its own
        assert memory.forward == 3 * wide


def test_attention_counts_its_scores(conditional: nn.Module, preparer: Any) -> None:
    prepared = preparer(conditional)
    call = prepared.signature.flatten((torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, 7, 6)), {})
    larger = prepared.signature.flatten((torch.zeros(1, 3, 64, 64), torch.zeros(1), torch.zeros(1, 7, 6)), {})
    heads, tokens = 2, 64 * 64
    assert row_memory(prepared.graph_module, larger).forward > 4 * 4 * heads * tokens**2
    assert row_memory(prepared.graph_module, call).forward < 2**20


def test_rows_fit_the_budget_and_one_is_always_taken() -> None:
    assert rows_within(100, 32, 1000) == 10
    assert rows_within(100, 8, 1000) == 8
    assert rows_within(5000, 8, 1000) == 1
    assert rows_within(0, 8, 1000) == 8
