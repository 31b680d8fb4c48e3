"""By how much a network shrinks its images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.graph.propagate import size_hint

aten = torch.ops.aten

_STRIDE_POSITION = {
    aten.conv2d.default: 3,
    aten.conv2d.padding: 3,
    aten.avg_pool2d.default: 2,
    aten.max_pool2d.default: 2,
}
"""Operators that may shrink an image, and the position of their stride; pools default to their kernel size."""


def largest_downsampling(graph: fx.Graph, sample: str) -> int:
    """The largest spatial reduction on any path from the input `sample`: strides multiply, upsampling divides.

    Heights and widths that are no multiple of it come back from the decoder with another size than the skips have.
    Other inputs do not count: ControlNet's picture is shrunk to the sample's size before they meet.
    """
    factors: dict[fx.Node, float] = {}
    for node in graph.nodes:
        sources = [item for item in node.all_input_nodes if item in factors]
        if not sources and not (node.op == "placeholder" and node.name == sample):
            continue
        factor = max((factors[item] for item in sources), default=1.0)
        if node.target in _STRIDE_POSITION:
            factor *= _stride(node)
        elif node.target in (aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec):
            factor /= _width(node) / _width(sources[0])
        factors[node] = factor
    return max(1, round(max(factors.values(), default=1.0)))


def _stride(node: fx.Node) -> int:
    args: Any = node.args
    target: Any = node.target
    position = _STRIDE_POSITION[target]
    stride: Any = args[position] if len(args) > position else node.kwargs.get("stride")
    if stride in (None, []):
        stride = args[1] if "pool" in str(node.target) else 1
    return int(max(stride)) if isinstance(stride, (list, tuple)) else int(stride)


def _width(node: fx.Node) -> int:
    """Width at capture; reading the hint adds no guard to a symbolic size."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return size_hint(value.shape[-1])
