"""The multiple that heights and widths must be, from the strides of a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qdiff_fx.graph.capture import capture


class Strided(nn.Module):
    def __init__(self, depth: int, *, pool: bool = False, up: bool = True) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.AvgPool2d(2) if pool else nn.Conv2d(1, 1, 3, stride=2, padding=1) for _ in range(depth)
        )
        self.up = up

    def forward(self, sample: Tensor) -> Tensor:
        h = sample
        for layer in self.down:
            h = layer(h)
        if self.up:
            for _ in self.down:
                h = functional.interpolate(h, scale_factor=2.0)
        return h


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("pool", [False, True])
def test_strides_multiply_along_the_deepest_path(depth: int, up: bool, pool: bool) -> None:
    net = Strided(depth, pool=pool, up=up).eval()
    assert capture(net, (torch.zeros(2, 1, 16, 16),)).signature.size_multiple == 2**depth


def test_down_and_up_twice_is_not_down_four_times() -> None:
    net = nn.Sequential(Strided(1), Strided(1)).eval()

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, sample: Tensor) -> Tensor:
            return self.net(sample)

    assert capture(Named().eval(), (torch.zeros(2, 1, 16, 16),)).signature.size_multiple == 2


def test_a_patch_embedding_counts_its_stride() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 4, stride=4)

        def forward(self, sample: Tensor) -> Tensor:
            return functional.pixel_shuffle(self.embed(sample).repeat(1, 2, 1, 1), 4)

    assert capture(Patches().eval(), (torch.zeros(2, 3, 16, 16),)).signature.size_multiple == 4


def test_another_inputs_own_strides_do_not_count() -> None:
    class Controlled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.picture, self.net = Strided(3, up=False), Strided(1)

        def forward(self, sample: Tensor, picture: Tensor) -> Tensor:
            return self.net(sample + self.picture(picture))

    call = (torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 128, 128))
    assert capture(Controlled().eval(), call).signature.size_multiple == 2
