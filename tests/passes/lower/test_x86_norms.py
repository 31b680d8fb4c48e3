"""Which group norms become the form that compiles well."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pass_checks import PassRun, run_pass
from qdiff_fx.kernels.x86_norms import group_norm
from qdiff_fx.passes.lower.carrier_weights import channels_last
from qdiff_fx.passes.lower.x86_norms import NormalizeByChannel

CALLS: dict[str, Callable[..., Tensor]] = {
    "affine": lambda x, weight, bias: nn.functional.group_norm(x, 3, weight, bias, 1e-6),
    "plain": lambda x, weight, bias: nn.functional.group_norm(x, 3),
    "weight alone": lambda x, weight, bias: nn.functional.group_norm(x, 3, weight),
    "named": lambda x, weight, bias: torch.group_norm(x, num_groups=3, bias=bias, cudnn_enabled=False),
    "sequence": lambda x, weight, bias: nn.functional.group_norm(x.flatten(2), 3, weight, bias),
}


class _Norm(nn.Module):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.call = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6)), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight, self.bias)


def norms(run: PassRun) -> int:
    return sum(node.target is group_norm for node in run.nodes)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_it_computes_what_it_did(call: Callable[..., Tensor]) -> None:
    run = run_pass(NormalizeByChannel(), _Norm(call), (torch.randn(2, 6, 4, 4),))
    assert run.result.modified and norms(run) == 1
    assert run.error() == 0.0


def test_without_pixels_it_is_left_alone() -> None:
    module = _Norm(lambda x, weight, bias: nn.functional.group_norm(x.mean((2, 3)), 3, weight, bias))
    run = run_pass(NormalizeByChannel(), module, (torch.randn(2, 6, 4, 4),))
    assert not run.result.modified and norms(run) == 0
    assert "no pixels" in run.reasons[0]


def test_kernels_of_one_channel_have_the_strides_too() -> None:
    assert channels_last(torch.randn(8, 1, 3, 3)).stride() == (9, 1, 3, 1)
    assert channels_last(torch.randn(8, 4, 3, 3)).stride() == (36, 1, 12, 4)
    assert channels_last(torch.randn(8, 4)).stride() == (4, 1)
