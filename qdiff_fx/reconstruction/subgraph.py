"""Cut a prepared graph into units that run one after the other: blocks to reconstruct, and what several share."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from qdiff_fx.errors import CalibrationError
from qdiff_fx.fake_quantize import ActivationQuantizer, AttentionQuantizer, QuantizerMode, WeightQuantizer
from qdiff_fx.graph.edit import get_tensor, layer_call
from qdiff_fx.graph.meta import BLOCK, LAYER

Owner = tuple[int, int]
"""(block, 1), or (first block that needs it, 0) for nodes that several blocks share: units run in this order."""


@dataclass(frozen=True, kw_only=True)
class UnitWeight:
    """A quantized weight of a unit: an input of its graph, after the activations.

    Args:
      owned: whether this is the first unit that reads it; only the owner learns its rounding.
    """

    name: str
    quantizer: WeightQuantizer
    weight: Tensor
    owned: bool


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of the graph that runs alone.

    Args:
      index: place in execution order.
      block: the reconstruction block, None for nodes that several blocks share (nothing is learned there).
      name: module path of the block's layers, for reports.
      graph_module: takes `inputs`, then the weights in order; returns a tuple, one tensor for each of `outputs`.
        Its tensors are shared with the model, without gradient.
      inputs: names of the nodes whose values go in; never the output of an activation quantizer.
      outputs: names of the nodes that something outside reads.
      weights: the quantized weights.
      quantizers: the activation quantizers that no earlier unit holds, in execution order.
    """

    index: int
    block: int | None
    name: str
    graph_module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[UnitWeight, ...] = ()
    quantizers: tuple[ActivationQuantizer, ...] = field(default=())

    def run(self, inputs: list[Tensor], weights: list[Tensor], mode: QuantizerMode) -> tuple[Tensor, ...]:
        """The unit's outputs, with activation quantizers in `mode`."""
        for module in self.moded:
            module.mode = mode
        result: tuple[Tensor, ...] = self.graph_module(*inputs, *weights)
        return result

    @cached_property
    def moded(self) -> tuple[ActivationQuantizer | AttentionQuantizer, ...]:
        """Everything in the unit that has a mode; looked up once, a step takes less than a walk over the modules."""
        kinds = (ActivationQuantizer, AttentionQuantizer)
        return tuple(module for module in self.graph_module.modules() if isinstance(module, kinds))

    @property
    def device(self) -> torch.device:
        """Where the unit's tensors are."""
        tensors = [item.weight for item in self.weights] + list(self.graph_module.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def full_weights(self) -> list[Tensor]:
        """The weights in full precision."""
        return [item.weight for item in self.weights]

    @property
    def quantized_weights(self) -> list[Tensor]:
        """The weights on their grids, rounded as their quantizers say."""
        with torch.no_grad():
            return [item.quantizer.quantized(item.weight) for item in self.weights]


def partition(graph_module: fx.GraphModule, granularity: str = "block") -> tuple[Unit, ...]:
    """The units of `graph_module` in execution order; what only leads from the last block to the output is left out.

    A node of no block belongs to the one block that needs it: padding and upsampling before a convolution are inside,
    and the smaller tensor is what crosses the boundary. Sizes and activation quantizers are repeated in every unit
    that needs them: a tensor is cached before it is quantized.

    Args:
      graph_module: prepared.
      granularity: "block", or "layer": every quantized layer is a block.
    """
    graph = graph_module.graph
    owners = _owners(graph_module, granularity)
    members: defaultdict[Owner, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node in owners:
            members[owners[node]].append(node)
    units: list[Unit] = []
    seen: dict[nn.Module, None] = {}
    for owner in sorted(members):
        units.append(_build(graph_module, members[owner], owner, owners, len(units), seen))
    return tuple(units)


def _owners(graph_module: fx.GraphModule, granularity: str) -> dict[fx.Node, Owner]:
    owners: dict[fx.Node, Owner] = {}
    layers = 0
    for node in graph_module.graph.nodes:
        if _is_repeated(graph_module, node) or node.op in ("placeholder", "output"):
            continue
        if granularity == "layer":
            if (layer := layer_call(node)) is not None and _holds(graph_module, layer.weight, WeightQuantizer):
                owners[node] = (layers, 1)
                layers += 1
        elif (block := BLOCK.get(node)) is not None:
            owners[node] = (block, 1)
    for node in reversed(graph_module.graph.nodes):
        if node in owners or _is_repeated(graph_module, node) or node.op in ("placeholder", "output"):
            continue
        readers = sorted({owners[user] for user in _readers(graph_module, node) if user in owners})
        if readers:
            owners[node] = readers[0] if len(readers) == 1 else (readers[0][0], 0)
    return owners


def _readers(graph_module: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """Nodes that read `node`, directly or through what is repeated in every unit."""
    for user in node.users:
        if _is_repeated(graph_module, user):
            yield from _readers(graph_module, user)
        else:
            yield user


def _is_repeated(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Tensors of the model, sizes and quantizers: free to compute again, or held once."""
    return (
        node.op == "get_attr"
        or isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, int))
        or _holds(graph_module, node, (ActivationQuantizer, WeightQuantizer))
    )


def _holds(graph_module: fx.GraphModule, node: fx.Node, kind: type | tuple[type, ...]) -> bool:
    return node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), kind)


def _build(
    graph_module: fx.GraphModule,
    nodes: list[fx.Node],
    owner: Owner,
    owners: dict[fx.Node, Owner],
    index: int,
    seen: dict[nn.Module, None],
) -> Unit:
    """The unit of `nodes`; adds the quantizers that it owns to `seen`."""
    needed, inputs = _closure(graph_module, nodes, owner, owners)
    outputs = [node for node in nodes if any(owners.get(user) != owner for user in _readers(graph_module, node))]
    graph, root = fx.Graph(), nn.Module()
    values = {node: graph.placeholder(node.name) for node in inputs}
    weights: list[UnitWeight] = []
    modules: list[ActivationQuantizer] = []
    for node in needed:
        if _holds(graph_module, node, WeightQuantizer):
            values[node] = graph.placeholder(node.name)
            weights.append(_unit_weight(graph_module, node, seen))
    for node in needed:
        if node in values or (node.op == "get_attr" and not any(u in needed and u not in values for u in node.users)):
            continue
        values[node] = graph.node_copy(node, values.__getitem__)
        if node.op == "get_attr":
            root.register_buffer(name := f"tensor_{node.name}", get_tensor(graph_module, node.target).detach())
            values[node].target = name
        elif node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            root.add_module(str(node.target), module)
            found = [item for item in module.modules() if isinstance(item, ActivationQuantizer)]
            modules.extend(item for item in found if item not in seen)
            seen.update(dict.fromkeys(found))
    graph.output(tuple(values[node] for node in outputs))
    graph.lint()
    block = owner[0] if owner[1] else None
    return Unit(
        index=index,
        block=block,
        name=_name(nodes) if block is not None else "shared",
        graph_module=fx.GraphModule(root, graph, class_name=f"Unit{index}").eval(),
        inputs=tuple(node.name for node in inputs),
        outputs=tuple(node.name for node in outputs),
        weights=tuple(weights),
        quantizers=tuple(modules),
    )


def _closure(
    graph_module: fx.GraphModule, nodes: list[fx.Node], owner: Owner, owners: dict[fx.Node, Owner]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """`nodes` with what is repeated for them, and the values that come from outside, both in graph order."""
    needed, inputs = dict.fromkeys(nodes), dict[fx.Node, None]()
    pending = list(nodes)
    while pending:
        for item in pending.pop().all_input_nodes:
            if _is_repeated(graph_module, item):
                if item not in needed:
                    needed[item] = None
                    pending.append(item)
            elif owners.get(item) != owner:
                if not isinstance(item.meta.get("val"), Tensor):
                    raise CalibrationError(
                        f"{item.name}: a value that is no tensor crosses from one block to another; "
                        f"reconstruct this model with granularity='layer'"
                    )
                inputs[item] = None
    position = {node: place for place, node in enumerate(graph_module.graph.nodes)}
    return sorted(needed, key=position.__getitem__), sorted(inputs, key=position.__getitem__)


def _unit_weight(graph_module: fx.GraphModule, node: fx.Node, seen: dict[nn.Module, None]) -> UnitWeight:
    quantizer, source = graph_module.get_submodule(str(node.target)), node.args[0]
    assert isinstance(quantizer, WeightQuantizer) and isinstance(source, fx.Node)
    owned = quantizer not in seen
    seen[quantizer] = None
    weight = get_tensor(graph_module, source.target).detach()
    return UnitWeight(name=str(source.target), quantizer=quantizer, weight=weight, owned=owned)


def _name(nodes: list[fx.Node]) -> str:
    """The longest module path that holds every layer and attention of `nodes`."""
    names = [policy.name.split("#")[0].split(".") for node in nodes if (policy := LAYER.get(node)) is not None]
    if not names:
        return nodes[-1].name
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))
    return ".".join(parts[0] for parts in shared) or ".".join(names[0])
