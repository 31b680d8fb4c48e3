"""Give spelled-out attention its one canonical form, scaled_dot_product_attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qdiff_fx.graph.edit import create_call, shape_of
from qdiff_fx.passes.base import PassContext, RewritePass
from qdiff_fx.passes.matcher import Product, factors_of, permuted, product_of

aten = torch.ops.aten

_LOWEST = -1e30
"""Absorbs every score, and fits bfloat16, which the smallest float32 does not."""

_TRANSPARENT = (
    aten.to.dtype,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
)


@dataclass(frozen=True, kw_only=True)
class SpelledAttention:
    """softmax(scale * q k^T + mask) v, spelled out."""

    scores: Product
    softmax: fx.Node
    output: Product
    """Its left side is the softmax."""
    swapped: bool
    """Whether the probabilities reach the second product transposed on its left side."""
    scale: float
    mask: fx.Node | None
    mask_scale: float
    fill: Fill | None
    internal: tuple[fx.Node, ...]
    """Nodes between the products: nobody else may read them."""


@dataclass(frozen=True, kw_only=True)
class Unsupported:
    """A softmax in a matrix product that is no attention which this pass can rewrite."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Fill:
    """Scores that a boolean tensor replaces by one number: where `condition` is true, or where it is not."""

    scores: fx.Node
    condition: fx.Node
    inverted: bool
    value: float


class CanonicalizeAttention(RewritePass[SpelledAttention | Unsupported]):
    """matmul/bmm/baddbmm/einsum -> scale -> mask -> softmax -> matmul/bmm/einsum becomes one attention node.

    The result differs from the spelled-out form by floating-point rounding only; a row that is wholly masked by minus
    infinity gives 0 instead of NaN. A mask is an addend, or scores that are filled with a number so low that adding it
    absorbs them. Left alone, each with its reason: softmax over another dimension than the keys', a scale applied after
    the mask, probabilities that something else reads (maps that are returned), products with broadcast or several
    contracted dimensions, anything else between the products.
    """

    def pattern(
        self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext
    ) -> SpelledAttention | Unsupported | None:
        product = product_of(node)
        if product is None:
            softmaxes = [item for item in factors_of(node) if _softmax_behind(item) is not None]
            return Unsupported(reason="its product broadcasts, or contracts several dimensions") if softmaxes else None
        for candidate in (product, product.transposed()):
            found = _softmax_behind(candidate.left)
            if found is not None:
                softmax, internal, swapped = found
                return _match(candidate, softmax, internal, swapped)
        return None

    def check(
        self, match: SpelledAttention | Unsupported, graph_module: fx.GraphModule, context: PassContext
    ) -> str | None:
        if isinstance(match, Unsupported):
            return match.reason
        rank = len(shape_of(match.softmax) or ())
        identity = tuple(range(rank))
        dim = match.softmax.args[1]
        assert isinstance(dim, int)
        if dim % rank != rank - 1 or match.scores.output_order != identity:
            return "softmax is not over the keys' dimension"
        wanted = (*identity[:-2], identity[-1], identity[-2]) if match.swapped else identity
        if match.output.left_order != wanted:
            return "the probabilities are rearranged before they meet v"
        for node in match.internal:
            if len(node.users) != 1:
                return f"{node.name} is read elsewhere too: attention maps are used"
        return None

    def rewrite(
        self, match: SpelledAttention | Unsupported, graph_module: fx.GraphModule, context: PassContext
    ) -> None:
        assert isinstance(match, SpelledAttention)
        graph, scores, output = graph_module.graph, match.scores, match.output
        swap = (*scores.right_order[:-2], scores.right_order[-1], scores.right_order[-2])
        like = output.node
        with graph.inserting_before(like):
            query = permuted(graph, scores.left, scores.left_order, like=like)
            key = permuted(graph, scores.right, swap, like=like)
            value = permuted(graph, output.right, output.right_order, like=like)
            mask = match.mask
            if match.fill is not None:
                mask = _additive(graph, match.fill, like=like)
            elif mask is not None and match.mask_scale != 1.0:
                mask = create_call(graph, aten.mul.Tensor, (mask, match.mask_scale), like=like)
            attention = create_call(
                graph,
                aten.scaled_dot_product_attention.default,
                (query, key, value, mask, 0.0, False),
                {"scale": match.scale},
                like=like,
            )
            result = permuted(graph, attention, output.output_order, like=like)
        like.replace_all_uses_with(result)
        graph.erase_node(like)
        for node in match.internal:  # fills in place would not count as dead code
            graph.erase_node(node)


def _additive(graph: fx.Graph, fill: Fill, *, like: fx.Node) -> fx.Node:
    """The mask that, added to scores, does what the fill does: its value or 0."""
    condition = fill.condition
    if fill.inverted:
        condition = create_call(graph, aten.logical_not.default, (condition,), like=like)
    zeros = create_call(graph, aten.to.dtype, (condition, fill.scores.meta["val"].dtype), like=like)
    value = fill.value if math.isinf(fill.value) else max(fill.value, _LOWEST)
    return create_call(graph, aten.masked_fill.Scalar, (zeros, condition, value), like=like)


def _softmax_behind(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...], bool] | None:
    """The softmax behind `node` through casts and swaps of the last two axes, the nodes between, parity of swaps."""
    between: list[fx.Node] = []
    swapped = False
    current = node
    while current.op == "call_function":
        if current.target in (aten.softmax.int, aten._softmax.default):
            return current, tuple(between), swapped
        if _swaps_last_two(current):
            swapped = not swapped
        elif current.target not in _TRANSPARENT:
            return None
        between.append(current)
        parent = current.args[0]
        assert isinstance(parent, fx.Node)
        current = parent
    return None


def _match(
    output: Product, softmax: fx.Node, between: tuple[fx.Node, ...], swapped: bool
) -> SpelledAttention | Unsupported:
    """Walk from the softmax back to the first product, through casts, one mask and constant scales."""
    internal = [*between, softmax]
    scale, mask, fill = 1.0, None, None
    current: Any = softmax.args[0]
    while (product := product_of(current)) is None:
        internal.append(current)
        args: Any = current.args
        masked = mask is not None or fill is not None
        if current.target in _TRANSPARENT:
            current = args[0]
        elif (factor := _constant_factor(current)) is not None:
            scale, current = scale * factor, args[0]
        elif (found := _fill(current)) is not None:
            if masked or scale != 1.0:
                return Unsupported(reason=f"{current.name} masks scores that are masked or scaled afterwards")
            if not _absorbs(found):
                return Unsupported(reason=f"{current.name} fills with {found.value}: too high to be a mask")
            fill, current = found, found.scores
        elif current.target is aten.add.Tensor and not current.kwargs:
            sides = [item for item in args if isinstance(item, fx.Node)]
            scores = next((item for item in sides if _leads_to_product(item)), None)
            if len(sides) != 2 or scores is None or masked or scale != 1.0:
                return Unsupported(reason=f"{current.name} adds to scores that are masked or scaled afterwards")
            mask = sides[1] if scores is sides[0] else sides[0]
            current = scores
        else:
            return Unsupported(reason=f"{current.name} stands between the softmax and a plain batched product")
        if current.op != "call_function":
            return Unsupported(reason=f"its scores come from {current.name}, no plain batched product")
    internal.append(product.node)
    if product.added is not None and (mask is not None or fill is not None or scale != 1.0):
        return Unsupported(reason=f"{product.node.name} adds to scores that are masked or scaled afterwards")
    return SpelledAttention(
        scores=product,
        softmax=softmax,
        output=output,
        swapped=swapped,
        scale=scale * product.scale,
        mask=mask or product.added,
        mask_scale=1.0 if mask is not None else product.added_scale,
        fill=fill,
        internal=tuple(internal),
    )


def _fill(node: fx.Node) -> Fill | None:
    """`node` as scores that a condition replaces by a number, or None."""
    args: Any = node.args
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill_.Scalar):
        return Fill(scores=args[0], condition=args[1], inverted=False, value=float(args[2]))
    if node.target is aten.where.ScalarOther:
        return Fill(scores=args[1], condition=args[0], inverted=True, value=float(args[2]))
    if node.target is aten.where.ScalarSelf and isinstance(args[2], fx.Node):
        return Fill(scores=args[2], condition=args[0], inverted=False, value=float(args[1]))
    return None


def _absorbs(fill: Fill) -> bool:
    """Whether the fill's value plus a score is the value again, so that adding does what replacing does."""
    return fill.value < 0 and -fill.value * torch.finfo(fill.scores.meta["val"].dtype).eps >= 1


def _leads_to_product(node: fx.Node) -> bool:
    while node.op == "call_function" and product_of(node) is None:
        if node.target not in _TRANSPARENT and _constant_factor(node) is None:
            return False
        parent = node.args[0]
        assert isinstance(parent, fx.Node)
        node = parent
    return node.op == "call_function"


def _constant_factor(node: fx.Node) -> float | None:
    """The constant that `node` multiplies its tensor by, or None."""
    if node.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(node.args[1], (int, float)):
        return float(node.args[1])
    if node.target in (aten.div.Tensor, aten.div.Scalar) and isinstance(node.args[1], (int, float)):
        return 1.0 / float(node.args[1])
    return None


def _swaps_last_two(node: fx.Node) -> bool:
    rank = len(shape_of(node) or ())
    args: Any = node.args
    if node.target is aten.mT.default:
        return True
    if node.target is aten.transpose.int:
        return {args[1] % rank, args[2] % rank} == {rank - 1, rank - 2}
    if node.target is aten.permute.default:
        return [axis % rank for axis in args[1]] == [*range(rank - 2), rank - 1, rank - 2]
    return False
