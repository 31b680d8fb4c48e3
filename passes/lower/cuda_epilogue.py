"""What follows a layer on the cuda backend, computed before its result leaves the registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qdiff_fx.graph.edit import get_tensor, shape_of
from qdiff_fx.graph.meta import KERNEL
from qdiff_fx.kernels.cuda_weights import SIGNED_OFFSET
from qdiff_fx.passes.base import PassContext, RewritePass
from qdiff_fx.passes.lower.integer_layers import add_constant
from qdiff_fx.passes.lower.signed_codes import unsigned_codes

aten = torch.ops.aten
qdiff = torch.ops.qdiff

_TARGETS = (qdiff.cuda_conv2d.default, qdiff.cuda_linear.default)
_EMBEDDING, _INV_SCALE, _RESIDUAL, _REQUANTIZE, _SILU = 7, 8, 9, 10, 11
"""Positions among the operators' arguments."""


@dataclass(frozen=True, kw_only=True)
class EpilogueStep:
    """`node` follows `layer`: add `operand` as `kind` "residual" or "embedding", "silu", or "requantize"."""

    node: fx.Node
    layer: fx.Node
    kind: str
    operand: fx.Node | None = None


class FuseCudaEpilogues(RewritePass[EpilogueStep]):
    """Adds of a tensor or of a [B, C] embedding, SiLU, and quantize steps go into the layer before them.

    Each rounds to the carrier type once less than the plan. A layer's own steps come in the kernel's order: embedding,
    residual, SiLU, quantize.

    Left alone: everything where every result must be seen; results that anything else reads; steps out of that order;
    sums that broadcast in another way, have another dtype or scale an operand; a second addition of a kind, unless the
    other addend is a layer that can take it.
    """

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> EpilogueStep | None:
        args: Any = node.args
        if node.target is aten.silu.default and _open(args[0], _SILU):
            return EpilogueStep(node=node, layer=args[0], kind="silu")
        if node.target is qdiff.quantize.default and _open(args[0], _INV_SCALE) and _by_output_channel(node):
            return EpilogueStep(node=node, layer=args[0], kind="requantize")
        if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
            return None
        for layer, operand in (args, args[::-1]):
            if not isinstance(operand, fx.Node) or not isinstance(layer, fx.Node):
                continue
            if not _same(layer, node) or _dtype(operand) != _dtype(node):
                continue
            if _open(layer, _RESIDUAL) and _same(operand, node):
                return EpilogueStep(node=node, layer=layer, kind="residual", operand=operand)
            vector = _embedding(operand)
            if _open(layer, _EMBEDDING) and vector is not None and layer.target is _TARGETS[0]:
                return EpilogueStep(node=node, layer=layer, kind="embedding", operand=vector)
        return None

    def check(self, match: EpilogueStep, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        return "every layer's result is asked for" if context.separate else None

    def rewrite(self, match: EpilogueStep, graph_module: fx.GraphModule, context: PassContext) -> None:
        graph, layer, node = graph_module.graph, match.layer, match.node
        arguments: list[Any] = list(layer.args)
        if match.kind == "silu":
            arguments[_SILU] = True
        elif match.kind == "requantize":
            _, inv_scale, zero_point, qmin, qmax, _ = node.args
            arguments[_REQUANTIZE] = [item - SIGNED_OFFSET for item in (zero_point, qmin, qmax)]  # type: ignore[operator]
            arguments[-1] = torch.int8
        else:
            arguments[_RESIDUAL if match.kind == "residual" else _EMBEDDING] = match.operand
        with graph.inserting_before(node):
            if match.kind == "requantize":
                steps = get_tensor(graph_module, inv_scale.target).detach()  # type: ignore[union-attr]
                outputs = (shape_of(layer) or ())[1 if layer.target is _TARGETS[0] else -1]
                vector = steps.expand(outputs).contiguous()
                arguments[_INV_SCALE] = add_constant(graph_module, f"cuda_{node.name}_inv_scale", vector)
            fused: fx.Node = graph.call_function(layer.target, tuple(arguments))  # type: ignore[arg-type]
            fused.meta = {**layer.meta, "val": node.meta["val"]}
            KERNEL.set(fused, f"{KERNEL.require(layer)} + {match.kind}")
            result = fused
            if match.kind == "requantize":
                fused.meta["val"] = node.meta["val"].view(torch.int8)
                result = unsigned_codes(graph, fused)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        graph.erase_node(layer)


def _open(layer: Any, position: int) -> bool:
    """Whether `layer` is a kernel whose result only this step reads, and that has neither it nor a later one."""
    if not isinstance(layer, fx.Node) or layer.target not in _TARGETS or len(layer.users) != 1:
        return False
    taken = {
        _EMBEDDING: layer.args[_EMBEDDING] is not None or layer.args[_RESIDUAL] is not None,
        _RESIDUAL: layer.args[_RESIDUAL] is not None,
        _SILU: False,
        _INV_SCALE: False,
    }
    return not taken[position] and not (layer.args[_SILU] and position != _INV_SCALE) and layer.args[_INV_SCALE] is None


def _same(left: fx.Node, right: fx.Node) -> bool:
    """Whether two nodes have one shape and dtype; sizes are compared by name, so that no guard arises."""
    shapes = [[str(size) for size in shape_of(item) or ()] for item in (left, right)]
    return shapes[0] == shapes[1] and _dtype(left) == _dtype(right)


def _dtype(node: fx.Node) -> Any:
    return getattr(node.meta.get("val"), "dtype", None)


def _embedding(node: fx.Node) -> fx.Node | None:
    """[B, C] that `node` shows as [B, C, 1, 1], or None."""
    shape = shape_of(node) or ()
    if len(shape) != 4 or [str(size) for size in shape[2:]] != ["1", "1"]:
        return None
    source: Any = node
    while source.target in (aten.unsqueeze.default, aten.slice.Tensor) and len(shape_of(source) or ()) > 2:
        source = source.args[0]
    fits = [str(size) for size in shape_of(source) or ()] == [str(size) for size in shape[:2]]
    return source if fits else None


def _by_output_channel(quantize: fx.Node) -> bool:
    """Whether a quantize step's scale is a constant along the output channels of the layer before it."""
    _, inv_scale, *_, axis = quantize.args
    source: Any = quantize.args[0]
    assert isinstance(inv_scale, fx.Node) and isinstance(axis, int)
    rank = len(shape_of(source) or ())
    channels = 1 if source.target is _TARGETS[0] else rank - 1
    return inv_scale.op == "get_attr" and (not shape_of(inv_scale) or axis % rank == channels)
