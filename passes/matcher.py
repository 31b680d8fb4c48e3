"""Batched matrix products in one normal form, whichever operator spells them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qdiff_fx.graph.edit import create_call, shape_of

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Product:
    """node = permute(left' @ right', output) with left' = permute(left, left_order) [..., M, K], right' [..., K, N].

    Orders are permutations of axes; `scale` multiplies the product, `added` (times `added_scale`) is added to it.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_order: tuple[int, ...]
    right_order: tuple[int, ...]
    output_order: tuple[int, ...]
    scale: float = 1.0
    added: fx.Node | None = None
    added_scale: float = field(default=1.0)

    def transposed(self) -> Product:
        """The same node with sides swapped: (A B) = (B^T A^T)^T."""
        inverse = list(range(len(self.output_order)))
        inverse[-1], inverse[-2] = inverse[-2], inverse[-1]
        return Product(
            node=self.node,
            left=self.right,
            right=self.left,
            left_order=swapped(self.right_order),
            right_order=swapped(self.left_order),
            output_order=tuple(inverse[axis] for axis in self.output_order),
            scale=self.scale,
            added=self.added,
            added_scale=self.added_scale,
        )


def swapped(order: tuple[int, ...]) -> tuple[int, ...]:
    """`order` with its last two axes exchanged."""
    return (*order[:-2], order[-1], order[-2])


def product_of(node: fx.Node) -> Product | None:
    """`node` as a batched matrix product of two tensors of equal rank, or None."""
    if node.op != "call_function":
        return None
    args: Any = node.args
    if node.target in (aten.matmul.default, aten.bmm.default):
        return _plain(node, args[0], args[1])
    if node.target is aten.baddbmm.default:
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        assert isinstance(beta, (int, float)) and isinstance(alpha, (int, float))
        return _plain(
            node, args[1], args[2], scale=float(alpha), added=args[0] if beta != 0 else None, added_scale=float(beta)
        )
    if node.target is aten.einsum.default and len(args[1]) == 2:
        return _einsum(node, str(args[0]), args[1])
    return None


def factors_of(node: fx.Node) -> list[fx.Node]:
    """What any kind of matrix product multiplies, even one that is no `Product`; [] for another node."""
    args: Any = node.args
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return [args[0], args[1]]
    return list(args[1]) if node.target is aten.einsum.default else []


def permuted(graph: fx.Graph, node: fx.Node, order: Sequence[int], *, like: fx.Node) -> fx.Node:
    """`node` with its axes in `order`; no call where that changes nothing."""
    if list(order) == list(range(len(order))):
        return node
    return create_call(graph, aten.permute.default, (node, list(order)), like=like)


def _plain(node: fx.Node, left: fx.Node, right: fx.Node, **extra: Any) -> Product | None:
    shapes = shape_of(left) or (), shape_of(right) or ()
    batches = [[str(size) for size in shape[:-2]] for shape in shapes]  # by name: no guard on a dynamic size
    if batches[0] != batches[1] or not batches[0]:
        return None
    order = tuple(range(len(shapes[0])))
    return Product(node=node, left=left, right=right, left_order=order, right_order=order, output_order=order, **extra)


def _einsum(node: fx.Node, equation: str, operands: Sequence[fx.Node]) -> Product | None:
    terms, _, output = equation.replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    plain = all(term.isalpha() and len(set(term)) == len(term) for term in (first, second, output))
    if not plain:
        return None
    batch = [letter for letter in first if letter in second and letter in output]
    contracted = [letter for letter in first if letter in second and letter not in output]
    rows = [letter for letter in first if letter not in second]
    columns = [letter for letter in second if letter not in first]
    if not (len(contracted) == len(rows) == len(columns) == 1) or set(output) != {*batch, *rows, *columns}:
        return None
    natural = [*batch, *rows, *columns]
    return Product(
        node=node,
        left=operands[0],
        right=operands[1],
        left_order=tuple(first.index(letter) for letter in [*batch, *rows, *contracted]),
        right_order=tuple(second.index(letter) for letter in [*batch, *contracted, *columns]),
        output_order=tuple(natural.index(letter) for letter in output),
    )
