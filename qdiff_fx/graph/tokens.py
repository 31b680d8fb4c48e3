"""Tell a graph's literal dtypes from those that stand for the carrier type."""

from __future__ import annotations

import torch
from torch import fx

from qdiff_fx.graph.meta import FIXED_DTYPE

aten = torch.ops.aten

_CASTS_AND_FACTORIES = (
    aten.to.dtype,
    aten._to_copy.default,
    aten.ones.default,
    aten.zeros.default,
    aten.full.default,
    aten.empty.memory_format,
)
_LAYERS = (aten.linear.default, aten.conv1d.default, aten.conv2d.default)


def mark_fixed_dtypes(graph: fx.Graph, timestep: str | None) -> None:
    """Mark the floating dtypes that must survive a change of carrier: the sinusoidal timestep arithmetic.

    A captured float32 graph writes the carrier and a deliberate float32 alike. What depends on nothing but the noise
    level, up to the layer that embeds it, is float32 on purpose (bfloat16 would round timestep 999 to 1000);
    everything else follows the carrier.
    """
    carried: set[fx.Node] = set()
    for node in graph.nodes:
        starts = node.op == "get_attr" or node.target in _LAYERS
        if node.op == "placeholder":
            starts = node.name != timestep
        # Sizes carry no dtype: ones(batch) * timestep is still timestep arithmetic.
        if isinstance(node.meta.get("val"), torch.SymInt):
            continue
        if starts or any(item in carried for item in node.all_input_nodes):
            carried.add(node)
    for node in graph.nodes:
        if node in carried or not _names_dtype(node):
            continue
        # The last cast before the embedding layer brings the value into the carrier type.
        embeds = bool(node.users) and all(user in carried for user in node.users)
        if not (embeds and node.target in _CASTS_AND_FACTORIES):
            FIXED_DTYPE.set(node, True)


def _names_dtype(node: fx.Node) -> bool:
    """Whether an argument of the call is a torch.dtype."""
    return any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))


def set_device(graph: fx.Graph, device: torch.device) -> None:
    """Make `device` the one that factories and casts name; a captured graph names the one that it was captured on."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(
                node.args, lambda item: device if isinstance(item, torch.device) else item
            )
            node.kwargs = fx.node.map_aggregate(
                node.kwargs, lambda item: device if isinstance(item, torch.device) else item
            )
