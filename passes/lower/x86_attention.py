"""Attention on the x86 backend: products of bytes where a kernel has them, scaled_dot_product_attention elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qdiff_fx.graph.edit import create_call, shape_of
from qdiff_fx.graph.meta import KERNEL
from qdiff_fx.graph.propagate import size_hint
from qdiff_fx.kernels.x86 import kernel_dtype
from qdiff_fx.kernels.x86_native import native_kernels
from qdiff_fx.passes.base import PassContext, RewritePass
from qdiff_fx.passes.lower.attention_codes import operand_codes, score_scale
from qdiff_fx.passes.lower.carrier_attention import drop_quantizers
from qdiff_fx.passes.lower.integer_layers import replace_call

qdiff = torch.ops.qdiff

CARRIER_SOFTMAX_BITS = 16
"""Width of probabilities that the plan leaves in the carrier type."""
_RANKS = (3, 4)
_MOST_KEYS, _MOST_SIZE, _MOST_SCALE = 65_536, 32_768, 1e20
"""What the kernel checks."""


class LowerX86Attention(RewritePass[fx.Node]):
    """qdiff.attention becomes qdiff.vnni_attention where that can run: faster than torch's at every size measured.

    Its probabilities lie on a finer grid than the plan's, and have 16 bits where the plan keeps them in the carrier
    type (docs/decisions/013). Elsewhere scaled_dot_product_attention runs in the carrier type, without rounding, and
    the report says why.

    Left alone: everything under strict=True, which keeps the simulated quantization.
    """

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> fx.Node | None:
        return node if node.target is qdiff.attention.default else None

    def check(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        return "strict=True keeps quantized attention" if context.strict else None

    def rewrite(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> None:
        reason = _reason(match)
        if reason is None:
            _use_kernel(match, graph_module)
        else:
            drop_quantizers(match, graph_module, reason)


def _reason(match: fx.Node) -> str | None:
    """Why the kernel cannot run an attention, None if it can."""
    arguments: Any = match.args
    query, key, value, mask, is_causal, _, scales = arguments[:7]
    if not scales:
        return "its operands are not quantized"
    kernels = native_kernels()
    if kernels is None or "attention" not in kernels.operators:
        return "no int8 attention kernel runs here"
    if not 0 <= score_scale(match) <= _MOST_SCALE:
        return "the int8 kernel wants a positive scale of the scores"
    if mask is not None or is_causal:
        return "the int8 kernel has no mask"
    shapes = [[size_hint(size) for size in shape_of(item) or ()] for item in (query, key, value)]
    if len(shapes[0]) not in _RANKS or any(shape[:-2] != shapes[0][:-2] for shape in shapes):
        return "the int8 kernel wants q, k and v of the same heads, and of a batch or none"
    if shapes[1][-2] > _MOST_KEYS or shapes[1][-1] > _MOST_SIZE:
        return f"the int8 kernel takes {_MOST_KEYS:,} keys and a head size of {_MOST_SIZE:,} at most"
    return None


def _use_kernel(match: fx.Node, graph_module: fx.GraphModule) -> None:
    arguments: Any = match.args
    *_, scales, zero_points, _, softmax_bits = arguments
    numbers = (
        score_scale(match),
        scales[2],
        [zero_points[0], zero_points[2]],
        2 ** (softmax_bits or CARRIER_SOFTMAX_BITS) - 1,
        kernel_dtype(match.meta["val"].dtype),
    )
    with graph_module.graph.inserting_before(match):
        codes = operand_codes(match, graph_module, f"x86_{match.name}")
        node = create_call(graph_module.graph, qdiff.vnni_attention.default, (*codes, *numbers), like=match)
    replace_call(match, node)
    KERNEL.set(node, "qdiff.vnni_attention")
