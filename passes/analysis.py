"""Structural facts about a captured UNet that several passes need. Nothing here knows a library's class names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from qdiff_fx.graph.edit import LAYER_OPERATORS, RANGE_KEEPING
from qdiff_fx.graph.meta import BLOCK, LAYER, MODULE_PATH, SPLIT_ADD
from qdiff_fx.graph.signature import CallSignature

aten = torch.ops.aten

_SCALING = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.mul.Scalar, aten.rsub.Scalar)
_JOINING = (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor)
_CARRYING = (
    *RANGE_KEEPING,
    aten.cat.default,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.slice.Tensor,
    aten.permute.default,
    aten.transpose.int,
    aten.view.default,
    aten.reshape.default,
    aten.pixel_unshuffle.default,
)


def reads_sample(node: fx.Node, signature: CallSignature) -> bool:
    """Whether `node` is the noisy sample itself: moved, joined, padded or scaled, but not yet mixed.

    It may be scaled by constants and by what the noise level alone decides, as in c_in(sigma) * x (EDM, table 1).
    """
    pending = [node]
    while pending:
        current = pending.pop()
        if current.op == "placeholder":
            if current.name == signature.sample:
                return True
        elif current.target in _CARRYING:
            pending.extend(current.all_input_nodes)
        else:
            pending.extend(_scaled(current, signature))
    return False


def depends_on_sample(node: fx.Node, signature: CallSignature) -> bool:
    """Whether any tensor path leads from the noisy sample to `node`; its sizes do not count."""
    seen: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        current = pending.pop()
        if current in seen or isinstance(current.meta.get("val"), torch.SymInt):
            continue
        seen[current] = None
        if current.op == "placeholder" and current.name == signature.sample:
            return True
        pending.extend(current.all_input_nodes)
    return False


def output_layers(graph: fx.Graph, signature: CallSignature) -> tuple[fx.Node, ...]:
    """The layers that make the first output: reached backwards through range-keeping operators, scaling and adds.

    An add counts if it joins the parts of a split, or if its other side is the sample: c_skip * x + c_out * y.
    """
    return tuple(dict.fromkeys(_output_layers(graph, signature)))


def _output_layers(graph: fx.Graph, signature: CallSignature) -> Iterator[fx.Node]:
    outputs = graph.output_node().args[0]
    first = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    pending = [first] if isinstance(first, fx.Node) else []
    while pending:
        current = pending.pop()
        if current.target in LAYER_OPERATORS:
            yield current
        elif current.target in _CARRYING or SPLIT_ADD.get(current):
            pending.extend(current.all_input_nodes)
        elif scaled := _scaled(current, signature):
            pending.extend(scaled)
        elif current.target in _JOINING:
            others = [item for item in current.all_input_nodes if not reads_sample(item, signature)]
            pending.extend(others if len(others) == 1 else [])


def _scaled(node: fx.Node, signature: CallSignature) -> list[fx.Node]:
    """The tensor that `node` scales or shifts by a constant or by a number of the noise level; [] for another node."""
    if node.target not in _SCALING:
        return []
    scaled = [item for item in node.all_input_nodes if not _is_factor(item, signature)]
    return scaled if len(scaled) == 1 else []


def _is_factor(node: fx.Node, signature: CallSignature) -> bool:
    """Whether `node` is at most one number a sample, and not made from the sample."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return False
    sizes = [str(size) for size in value.shape]  # by name: no guard on a dynamic size
    one_number = set(sizes[1:]) <= {"1"} and (len(sizes) != 1 or sizes == ["1"])
    return one_number and not depends_on_sample(node, signature)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A reconstruction block, in execution order: where its last node comes from, and its layers."""

    index: int
    name: str
    layers: tuple[str, ...]


def blocks(graph_module: fx.GraphModule) -> Iterator[Block]:
    """The reconstruction blocks in execution order, named by the module path that their layers share."""
    layers: dict[int, list[str]] = {}
    paths: dict[int, list[str]] = {}
    for node in graph_module.graph.nodes:
        index, policy = BLOCK.get(node), LAYER.get(node)
        if index is None or policy is None:
            continue
        layers.setdefault(index, []).append(policy.name)
        paths.setdefault(index, []).append(MODULE_PATH.get(node) or policy.name)
    for index in sorted(layers):
        yield Block(index=index, name=_common_path(paths[index]), layers=tuple(layers[index]))


def _common_path(paths: list[str]) -> str:
    """The module path that all of `paths` lie under; the only path itself."""
    common = paths[0].split(".")
    for path in paths[1:]:
        parts = path.split(".")
        length = next((i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), len(common))
        common = common[: min(length, len(parts))]
    return ".".join(common)
