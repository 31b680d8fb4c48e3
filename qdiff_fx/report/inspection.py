"""What `prepare` found in a network: shortcuts, attentions, layers, blocks and sizes, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, fx

from qdiff_fx.config import CARRIER_BITS
from qdiff_fx.fake_quantize import ActivationQuantizer, AttentionQuantizer, WeightQuantizer
from qdiff_fx.graph.edit import get_tensor, layer_call
from qdiff_fx.graph.meta import ATTENTION, BLOCK, LAYER, SPLIT_PART
from qdiff_fx.model import PreparedUNet
from qdiff_fx.passes.analysis import Block, blocks
from qdiff_fx.passes.prepare.correct_biases import bias_correction

_PACKED_BITS = 4
"""Codes of so many bits or fewer are stored two to a byte, wider ones one to a byte."""


@dataclass(frozen=True, kw_only=True)
class ShortcutPart:
    """One operand of a split shortcut.

    Args:
      channels: how many.
      minimum, maximum: of what was observed; None if nothing was, or the operand stays in the carrier type.
    """

    channels: int
    minimum: float | None
    maximum: float | None

    @property
    def span(self) -> float | None:
        """Width of the range, zero included, as the grid has to cover it."""
        if self.minimum is None or self.maximum is None:
            return None
        return max(self.maximum, 0.0) - min(self.minimum, 0.0)


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """A layer that read a channel cat, and its parts in channel order."""

    layer: str
    parts: tuple[ShortcutPart, ...]

    @property
    def range_ratio(self) -> float | None:
        """Span of the widest part over that of the narrowest, >= 1; None if unknown."""
        spans = [part.span for part in self.parts]
        known = [span for span in spans if span is not None]
        return max(known) / min(known) if len(known) == len(spans) and min(known, default=0.0) > 0 else None


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One conv or linear: bits (None: carrier type), parameters, bytes as given and as stored after conversion."""

    name: str
    operator: str
    block: int | None
    weight_bits: int | None
    activation_bits: int | None
    parameters: int
    bytes_before: int
    bytes_after: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class AttentionRow:
    """One attention: bits of q, k, v and of the probabilities; None: carrier type."""

    name: str
    operand_bits: int | None
    softmax_bits: int | None


@dataclass(frozen=True, kw_only=True)
class SizeRow:
    """Parameters and bytes of one weight width; `bits` is 32 for what stays in the carrier type."""

    bits: int
    parameters: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that `qdiff-fx inspect` prints."""

    shortcuts: tuple[Shortcut, ...]
    attentions: tuple[AttentionRow, ...]
    layers: tuple[LayerRow, ...]
    blocks: tuple[Block, ...]
    sizes: tuple[SizeRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the range ratios."""
        data = asdict(self)
        for row, shortcut in zip(data["shortcuts"], self.shortcuts, strict=True):
            row["range_ratio"] = shortcut.range_ratio
        return data


def inspect_prepared(prepared: PreparedUNet) -> Inspection:
    """The structure of a prepared model; ranges are those that it has observed so far."""
    graph_module = prepared.graph_module
    layers = tuple(_layer_rows(graph_module))
    return Inspection(
        shortcuts=tuple(_shortcuts(graph_module)),
        attentions=tuple(_attentions(graph_module)),
        layers=layers,
        blocks=tuple(blocks(graph_module)),
        sizes=_sizes(graph_module, layers),
    )


def _shortcuts(graph_module: fx.GraphModule) -> Iterator[Shortcut]:
    groups: dict[tuple[str, str], list[ShortcutPart]] = {}
    for node in graph_module.graph.nodes:
        part, layer = SPLIT_PART.get(node), layer_call(node)
        if part is None or layer is None:
            continue
        quantizer = _module(graph_module, layer.input)
        observed = isinstance(quantizer, ActivationQuantizer) and quantizer.observer.observed
        groups.setdefault((part.cat, LAYER.require(node).name.rpartition("#")[0]), []).append(
            ShortcutPart(
                channels=part.stop - part.start,
                minimum=float(quantizer.observer.minimum) if observed else None,
                maximum=float(quantizer.observer.maximum) if observed else None,
            )
        )
    for (_, name), parts in groups.items():
        yield Shortcut(layer=name, parts=tuple(parts))


def _attentions(graph_module: fx.GraphModule) -> Iterator[AttentionRow]:
    for node in graph_module.graph.nodes:
        policy = ATTENTION.get(node)
        if policy is not None:
            quantized = isinstance(_module(graph_module, node), AttentionQuantizer)
            operands, probabilities = policy.query_key_value, policy.probabilities
            yield AttentionRow(
                name=policy.name,
                operand_bits=operands.bits if quantized and operands else None,
                softmax_bits=probabilities.bits if quantized and probabilities else None,
            )


def _layer_rows(graph_module: fx.GraphModule) -> Iterator[LayerRow]:
    for node in graph_module.graph.nodes:
        policy, layer = LAYER.get(node), layer_call(node)
        if policy is None or layer is None:
            continue
        quantizer = _module(graph_module, layer.weight)
        weight = get_tensor(graph_module, layer.weight_source.target)
        bias = None if layer.bias_source is None else get_tensor(graph_module, layer.bias_source.target)
        correction = bias_correction(graph_module, node)
        stored_bias = bias if correction is None else correction.corrected(bias)
        bits = quantizer.spec.bits if isinstance(quantizer, WeightQuantizer) else None
        activation = _module(graph_module, layer.input)
        yield LayerRow(
            name=policy.name,
            operator=policy.operator,
            block=BLOCK.get(node),
            weight_bits=bits,
            activation_bits=activation.spec.bits if isinstance(activation, ActivationQuantizer) else None,
            parameters=weight.numel() + (bias.numel() if bias is not None else 0),
            bytes_before=_bytes(weight) + _bytes(bias),
            bytes_after=(_bytes(weight) if bits is None else _stored_bytes(weight, quantizer)) + _bytes(stored_bias),
            reason=policy.reason,
        )


def _stored_bytes(weight: Tensor, quantizer: WeightQuantizer) -> int:
    """Codes, a float32 scale a channel, and where codes are packed a zero point of one byte and shifts of two bits."""
    channels = weight.shape[0]
    if quantizer.spec.bits > _PACKED_BITS:
        return weight.numel() + 4 * channels
    shift = quantizer.channel_shift
    return math.ceil(weight.numel() / 2) + 5 * channels + (0 if shift is None else math.ceil(shift.numel() / 4))


def _sizes(graph_module: fx.GraphModule, layers: tuple[LayerRow, ...]) -> tuple[SizeRow, ...]:
    groups: dict[int, list[int]] = {}

    def add(bits: int, parameters: int, before: int, after: int) -> None:
        totals = groups.setdefault(bits, [0, 0, 0])
        for index, value in enumerate((parameters, before, after)):
            totals[index] += value

    for row in layers:
        add(row.weight_bits or CARRIER_BITS, row.parameters, row.bytes_before, row.bytes_after)
    for tensor in _other_parameters(graph_module):
        add(CARRIER_BITS, tensor.numel(), _bytes(tensor), _bytes(tensor))
    return tuple(
        SizeRow(bits=bits, parameters=totals[0], bytes_before=totals[1], bytes_after=totals[2])
        for bits, totals in sorted(groups.items())
    )


def _other_parameters(graph_module: fx.GraphModule) -> Iterator[Tensor]:
    """Parameters that no conv or linear reads: normalisations, embeddings."""
    layer_tensors: dict[str, None] = {}
    for node in graph_module.graph.nodes:
        layer = layer_call(node)
        if layer is None or LAYER.get(node) is None:
            continue
        for item in (layer.weight_source, layer.bias_source):
            if item is not None:
                layer_tensors[str(item.target)] = None
    targets = dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr")
    for target in targets:
        if target not in layer_tensors:
            yield get_tensor(graph_module, target)


def _module(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
