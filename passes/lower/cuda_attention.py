"""Attention on the cuda backend: int8 products where they win, scaled_dot_product_attention elsewhere."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from qdiff_fx.graph.edit import shape_of
from qdiff_fx.graph.meta import KERNEL
from qdiff_fx.graph.propagate import size_hint
from qdiff_fx.kernels.cuda_gpu import GPUS, Gpu
from qdiff_fx.kernels.cuda_model import AttentionWork, carrier_attention, integer_attention
from qdiff_fx.kernels.cuda_tiles import AttentionTile, attention_tiles
from qdiff_fx.kernels.cuda_weights import SIGNED_OFFSET
from qdiff_fx.passes.base import PassContext, RewritePass
from qdiff_fx.passes.lower.attention_codes import operand_codes, score_scale
from qdiff_fx.passes.lower.carrier_attention import drop_quantizers
from qdiff_fx.passes.lower.cuda_target import DEFAULT_CAPABILITY, target_gpu
from qdiff_fx.passes.lower.integer_layers import replace_call
from qdiff_fx.passes.lower.signed_codes import signed_codes

qdiff = torch.ops.qdiff


class LowerCudaAttention(RewritePass[fx.Node]):
    """qdiff.attention becomes qdiff.cuda_attention where that was timed, or else is predicted, to win, or under strict.

    Elsewhere it becomes scaled_dot_product_attention in the carrier type, and the report says by how much.

    Left alone: under strict=True, attention without quantized operands or probabilities, which has no integer kernel;
    it stays simulated.
    """

    def pattern(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> fx.Node | None:
        return node if node.target is qdiff.attention.default else None

    def check(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> str | None:
        if context.strict and not has_kernel(match):
            return "strict=True keeps quantizers that no integer kernel has"
        return None

    def rewrite(self, match: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> None:
        gpu = target_gpu(graph_module)
        reason = None if context.strict else _reason(match, gpu, context)
        if reason is None:
            kernels = attention_kernels(match, gpu)
            _use_kernel(match, graph_module, kernels[context.kernels.get(match.name, next(iter(kernels)))])
        else:
            drop_quantizers(match, graph_module, reason)


def _reason(match: fx.Node, gpu: Gpu | None, context: PassContext) -> str | None:
    """Why the attention is better off in the carrier type, None if it is not."""
    if not has_kernel(match):
        return "its operands or probabilities are not quantized"
    if match.name in context.carrier_layers or match.name in context.kernels:
        return context.carrier_layers.get(match.name)
    work, judge = attention_work(match), gpu or GPUS[DEFAULT_CAPABILITY]
    integer, carrier = (1e6 * model(work, judge).predicted for model in (integer_attention, carrier_attention))
    if integer < carrier:
        return None
    return f"predicted {integer:.1f} us on integers, {carrier:.1f} us in the carrier type"


def has_kernel(node: fx.Node) -> bool:
    """Whether a qdiff.attention has quantized operands and probabilities, as the integer kernel needs them."""
    arguments: Any = node.args
    return bool(arguments[6]) and bool(arguments[9])


def attention_kernels(node: fx.Node, gpu: Gpu | None) -> dict[str, AttentionTile]:
    """Tiles that can run a qdiff.attention, by name; the one that is taken without timings first."""
    return {str(tile): tile for tile in attention_tiles(attention_work(node).head, gpu)}


def attention_work(node: fx.Node) -> AttentionWork:
    """The size of a qdiff.attention in calibration."""
    arguments: Any = node.args
    query, key = ([size_hint(size) for size in shape_of(item) or ()] for item in arguments[:2])
    return AttentionWork(heads=prod(query[:-2]), queries=query[-2], keys=key[-2], head=query[-1])


def _use_kernel(match: fx.Node, graph_module: fx.GraphModule, tile: AttentionTile) -> None:
    graph = graph_module.graph
    arguments: Any = match.args
    *_, mask, is_causal, _, scales, zero_points, _, softmax_bits = arguments
    qmax = 2**softmax_bits - 1
    with graph.inserting_before(match):
        codes = [signed_codes(graph, node) for node in operand_codes(match, graph_module, f"cuda_{match.name}")]
        numbers = (
            score_scale(match),
            scales[2] / qmax,
            [item - SIGNED_OFFSET for item in zero_points],
            qmax,
            tile.arguments,
            match.meta["val"].dtype,
        )
        node = graph.call_function(qdiff.cuda_attention.default, (*codes, mask, is_causal, *numbers))
    node.meta["val"] = match.meta["val"]
    replace_call(match, node)
    KERNEL.set(node, f"qdiff.cuda_attention {tile}")
