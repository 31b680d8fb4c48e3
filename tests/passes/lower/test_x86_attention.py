"""The pass that chooses x86's attention: the kernel's results are those of the codes; what it cannot take stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qdiff_fx
from qdiff_fx.graph.meta import FALLBACK
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.kernels import BACKENDS
from qdiff_fx.kernels.reference import attention as reference_attention
from qdiff_fx.kernels.x86_native import VNNI, load_kernels
from qdiff_fx.passes.base import PassContext, run_passes
from qdiff_fx.passes.lower import LOWER, x86_attention

aten = torch.ops.aten
qdiff = torch.ops.qdiff

_REASON = BACKENDS["x86"].unavailable("cpu")
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


def attention_alone(operands: list[Tensor], mask: Tensor | None, numbers: tuple[Any, ...]) -> fx.GraphModule:
    graph = fx.Graph()
    values = [*operands, mask]
    nodes = [None if value is None else graph.placeholder(name) for name, value in zip("qkvm", values, strict=True)]
    for node, value in zip(nodes, values, strict=True):
        if node is not None:
            node.meta["val"] = value
    call = graph.call_function(qdiff.attention.default, (*nodes, *numbers))
    call.meta["val"] = torch.empty_like(operands[0])
    graph.output(call)
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.skipif(not load_kernels(VNNI), reason="the CPU has no AVX512-VNNI")
@pytest.mark.parametrize("leading", [(6,), (2, 3)])
@pytest.mark.parametrize(
    ("scale", "operand_bits", "softmax_bits", "share"),
    [(None, 8, 8, 1.0), (None, 8, 0, 0.01), (0.7, 8, 8, 1.0), (0.7, 6, 8, 1.0), (None, 8, 4, 1.0)],
)
def test_attention_of_bytes_is_that_of_its_codes(
    leading: tuple[int, ...],
    scale: float | None,
    operand_bits: int,
    softmax_bits: int,
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against attention in float64 on the operands' grids it errs by at most what the plan does with 8 bits."""
    monkeypatch.setattr(x86_attention, "native_kernels", lambda: VNNI)
    torch.manual_seed(0)
    operands = [torch.randn(*leading, length, 8) + shift for length, shift in ((5, 0.0), (70, 0.3), (70, -0.5))]
    steps, zero_points = [0.03, 0.04, 0.05], [100, 140, 120]
    if operand_bits == 6:
        steps, zero_points = [0.12, 0.16, 0.2], [25, 35, 30]
    graph_module = attention_alone(operands, None, (False, scale, steps, zero_points, operand_bits, softmax_bits))
    signature = CallSignature(inputs=(), parameters=tuple("qkv"), structure={}, sample="q", timestep=None)
    run_passes(LOWER["x86"], graph_module, PassContext(config=qdiff_fx.QDiffConfig(), signature=signature))
    assert len(graph_module.graph.find_nodes(op="call_function", target=qdiff.vnni_attention.default)) == 1
    exact = reference_attention(*operands, None, False, scale, steps, zero_points, operand_bits, 0)
    planned = reference_attention(*operands, None, False, scale, steps, zero_points, operand_bits, softmax_bits or 8)
    error, planned_error = (float((item - exact).norm()) for item in (graph_module(*operands), planned))
    assert error <= share * planned_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_or_unquantized_attention_stays_in_the_carrier_type(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(x86_attention, "native_kernels", lambda: VNNI)
    signature = CallSignature(inputs=(), parameters=tuple("qkvm"), structure={}, sample="q", timestep=None)
    context = PassContext(config=qdiff_fx.QDiffConfig(), signature=signature)
    operands = [torch.randn(2, 3, length, 8, dtype=dtype) for length in (5, 7, 7)]
    quantized = ([0.1] * 3, [0] * 3, 8, 8)
    wide = torch.randn(2, 1, 3, 5, 8, dtype=dtype)
    for inputs, mask, numbers, reason in (
        (operands, torch.randn(5, 7), (False, None, *quantized), "no mask"),
        (operands, None, (True, None, *quantized), "no mask"),
        (operands, None, (False, None, [], [], 0, 8), "not quantized"),
        (operands, None, (False, -0.5, *quantized), "positive scale"),
        (
            [operands[0][..., :1], *[torch.zeros(2, 3, 65_537, 1, dtype=dtype)] * 2],
            None,
            (False, None, *quantized),
            "65,536 keys",
        ),
        ([operands[0], *(item[:, :1] for item in operands[1:])], None, (False, None, *quantized), "same heads"),
        ([wide, wide, wide], None, (False, None, *quantized), "of a batch or none"),
    ):
        graph_module = attention_alone(inputs, mask, numbers)
        run_passes((x86_attention.LowerX86Attention(),), graph_module, context)
        (call,) = graph_module.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
        assert reason in (FALLBACK.get(call) or "")
