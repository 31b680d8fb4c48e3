"""What reaches what: the noisy sample, and the layers that make the output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qdiff_fx.graph.capture import capture
from qdiff_fx.graph.meta import MODULE_PATH
from qdiff_fx.passes.analysis import depends_on_sample, output_layers, reads_sample


class Net(nn.Module):
    def __init__(self, before: Callable[[Tensor, Tensor], Tensor], after: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.first, self.last, self.embed = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(1, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.first(self.before(sample, timestep[:, None, None, None]))
        h = h.sin() + self.embed(timestep[:, None])[:, :, None, None]
        return self.after(self.last(h), sample)


def _layers(
    before: Callable[[Tensor, Tensor], Tensor] = lambda x, t: x,
    after: Callable[[Tensor, Tensor], Tensor] = lambda y, x: y,
) -> tuple[list[str], list[str], list[str]]:
    """Paths of the layers that read the sample, that depend on it, and that make the output."""
    captured = capture(Net(before, after).eval(), (torch.randn(2, 4, 8, 8), torch.rand(2)))
    graph, signature = captured.graph_module.graph, captured.signature
    layers = {MODULE_PATH.get(node): node for node in graph.nodes if str(node.target) in _TARGETS}
    reading = [path for path, node in layers.items() if reads_sample(node.args[0], signature)]
    depending = [path for path, node in layers.items() if depends_on_sample(node, signature)]
    return reading, depending, [str(MODULE_PATH.get(node)) for node in output_layers(graph, signature)]


_TARGETS = ("aten.conv2d.default", "aten.linear.default")


def test_a_plain_net() -> None:
    assert _layers() == (["first"], ["first", "last"], ["last"])


@pytest.mark.parametrize(
    "before",
    [
        lambda x, t: x * 0.18 + 1,
        lambda x, t: torch.nn.functional.pad(x, (1, 1, 1, 1)),
        lambda x, t: torch.cat([x[:, :2], x[:, 2:]], dim=1),
        lambda x, t: x.to(torch.float64).to(torch.float32).contiguous(),
        lambda x, t: x / (t**2 + 0.25).sqrt(),
    ],
    ids=["scaled", "padded", "cut and joined", "cast", "scaled by the noise level"],
)
def test_moving_and_scaling_still_reads_the_sample(before: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert _layers(before)[0] == ["first"]


@pytest.mark.parametrize(
    "before",
    [
        lambda x, t: x.sin(),
        lambda x, t: x * x.mean((1, 2, 3), keepdim=True),
        lambda x, t: x * torch.arange(1.0, 9.0),
        lambda x, t: x + t.expand(-1, 1, 8, 8).sin(),
        lambda x, t: torch.nn.functional.group_norm(x, 2),
    ],
    ids=["nonlinearity", "scaled by itself", "scaled by position", "a map added", "normalised"],
)
def test_mixing_ends_it(before: Callable[[Tensor, Tensor], Tensor]) -> None:
    reading, depending, _ = _layers(before)
    assert reading == [] and depending == ["first", "last"]


@pytest.mark.parametrize(
    ("after", "wanted"),
    [
        (lambda y, x: y * 0.5, ["last"]),
        (lambda y, x: torch.nn.functional.interpolate(y, scale_factor=2.0), ["last"]),
        (lambda y, x: y.tanh(), []),
        (lambda y, x: y + 0.5 * x, ["last"]),
        (lambda y, x: 0.3 * x - y.float() * 0.7, ["last"]),
        (lambda y, x: y + x.sin(), []),
        (lambda y, x: x * y.mean((1, 2, 3), keepdim=True), []),
    ],
    ids=["scaled", "upsampled", "squashed", "sample added", "velocity", "something else added", "a factor"],
)
def test_output_layers_reach_the_output_by_range_keeping_operators_and_adds_of_the_sample(
    after: Callable[[Tensor, Tensor], Tensor], wanted: list[str]
) -> None:
    assert _layers(after=after)[2] == wanted


def test_the_layers_of_a_preconditioned_network_are_found_inside() -> None:
    """c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x), Karras et al. 2022, table 1."""

    class Preconditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(lambda x, t: x, lambda y, x: y)

        def forward(self, sample: Tensor, sigma: Tensor) -> Tensor:
            level = sigma.reshape(-1, 1, 1, 1)
            total = (level**2 + 0.25).sqrt()
            output = self.net(sample / total, sigma.log() / 4)
            return 0.25 / total**2 * sample + level * 0.5 / total * output

    captured = capture(Preconditioned().eval(), (torch.randn(2, 4, 8, 8), torch.rand(2) + 0.1))
    graph, signature = captured.graph_module.graph, captured.signature
    layers = {MODULE_PATH.get(node): node for node in graph.nodes if str(node.target) in _TARGETS}
    assert [path for path, node in layers.items() if reads_sample(node.args[0], signature)] == ["net.first"]
    assert [MODULE_PATH.get(node) for node in output_layers(graph, signature)] == ["net.last"]
