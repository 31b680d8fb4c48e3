"""Every qdiff operator keeps the contract of a torch operator: fakes, schema, tracing, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdiff_fx.kernels import ops as ops
from qdiff_fx.numerics.attention import attend
from qdiff_fx.numerics.packing import pack_int4, pack_shifts
from qdiff_fx.numerics.spec import QuantSpec

qdiff = torch.ops.qdiff

pytestmark = pytest.mark.usefixtures("unchecked_shapes")


def _codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _packed(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit weight, zero points and shifts."""
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    shifts = pack_shifts(torch.randint(0, 4, (shape[1],), dtype=torch.uint8))
    return pack_int4(codes), torch.randint(0, 16, (shape[0],), dtype=torch.uint8), shifts


def _calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    weight8 = torch.randint(-127, 128, (4, 6, 3, 3), dtype=torch.int8)
    packed, zero_point, shift = _packed(4, 6, 3, 3)
    linear8 = torch.randint(-127, 128, (4, 6), dtype=torch.int8)
    packed_linear, linear_zero_point, linear_shift = _packed(4, 6)
    scale, bias = torch.rand(4), torch.randn(4)
    geometry = ([4, 6, 3, 3], [2, 1], [1, 0], [1, 2], 1, torch.float32)
    channels_last = _codes(2, 6, 7, 9).to(memory_format=torch.channels_last)
    attention = (torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6))
    grids = ([0.1, 0.2, 0.1], [128, 120, 130], 8, 8)
    return {
        "quantize by a scalar": (qdiff.quantize, (torch.randn(2, 6, 4, 4), torch.tensor(9.0), 128, 0, 255, 1)),
        "quantize by a vector": (qdiff.quantize, (torch.randn(2, 5, 6), torch.rand(6) * 9, 7, 0, 15, 2)),
        "quantize channels_last": (
            qdiff.quantize,
            (torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last), torch.rand(6), 7, 0, 255, 1),
        ),
        "quantize a transposed tensor": (
            qdiff.quantize,
            (torch.randn(2, 6, 5).transpose(1, 2), torch.tensor(3.0), 7, 0, 255, 2),
        ),
        "quantize bfloat16": (qdiff.quantize, (torch.randn(2, 6).bfloat16(), torch.tensor(3.0), 7, 0, 255, 1)),
        "conv2d W8": (qdiff.conv2d, (_codes(2, 6, 7, 9), weight8, scale, None, None, bias, 0.1, 128, *geometry)),
        "conv2d W4": (
            qdiff.conv2d,
            (channels_last, packed, scale, zero_point, shift, None, 0.1, 128, *geometry[:-1], torch.bfloat16),
        ),
        "conv2d of an empty batch": (
            qdiff.conv2d,
            (_codes(0, 6, 7, 9), weight8, scale, None, None, bias, 0.1, 128, *geometry),
        ),
        "linear W8": (qdiff.linear, (_codes(2, 5, 6), linear8, scale, None, None, bias, 0.1, 9, [4, 6], torch.float32)),
        "linear W4 of a transposed input": (
            qdiff.linear,
            (
                _codes(2, 6, 5).transpose(1, 2),
                packed_linear,
                scale,
                linear_zero_point,
                linear_shift,
                None,
                0.1,
                9,
                [4, 6],
                torch.bfloat16,
            ),
        ),
        "dequantize W8": (qdiff.dequantize_weight, (weight8, scale, None, [4, 6, 3, 3], torch.float32)),
        "dequantize W4": (qdiff.dequantize_weight, (packed, scale, zero_point, [4, 6, 3, 3], torch.bfloat16)),
        "attention": (qdiff.attention, (*attention, None, False, None, *grids)),
        "attention with a mask and a scale": (qdiff.attention, (*attention, torch.randn(5, 7), False, 0.3, *grids)),
        "attention with floating operands": (qdiff.attention, (*attention, None, False, None, [], [], 0, 6)),
        "attention with floating probabilities": (
            qdiff.attention,
            (attention[0], attention[0], attention[0], None, True, None, *grids[:-1], 0),
        ),
    }


@pytest.mark.parametrize("name", list(_calls()))
def test_operator_keeps_the_contract_of_torch(name: str) -> None:
    operator, arguments = _calls()[name]
    # No gradients: integers have none.
    torch.library.opcheck(
        operator.default, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


def test_attention_is_the_shared_definition_on_quantized_operands() -> None:
    query, key, value = torch.randn(2, 5, 4), torch.randn(2, 7, 4), torch.randn(2, 7, 3)
    seen = qdiff.attention(query, key, value, None, False, 0.4, [0.05] * 3, [128, 120, 130], 8, 8)

    def rounded(x: Tensor, zero_point: int) -> Tensor:
        return (torch.clamp(torch.round(x / 0.05) + zero_point, 0, 255) - zero_point) * 0.05

    wanted = attend(
        rounded(query, 128), rounded(key, 120), rounded(value, 130), None, False, 0.4, QuantSpec(bits=8, symmetric=True)
    )
    # The division above may put a tie on the other side: at most one code of one operand, 0.05 of about 1.
    assert (seen - wanted).abs().max() < 0.05
    assert (seen - wanted).abs().mean() < 1e-3


class Small(nn.Module):
    """quantize -> conv2d -> quantize -> linear on constants, as converted graphs do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (4, 3, 3, 3), dtype=torch.int8))
        packed, zero_point, shift = _packed(5, 4)
        for name, value in (("packed", packed), ("zero_point", zero_point), ("shift", shift)):
            self.register_buffer(name, value)
        self.register_buffer("inv_scale", torch.rand(3) * 30)
        self.register_buffer("scale", torch.rand(4) / 100)

    def forward(self, x: Tensor) -> Tensor:
        codes = qdiff.quantize(x, self.inv_scale, 128, 0, 255, 1)
        shape = [4, 3, 3, 3]
        h = qdiff.conv2d(
            codes, self.weight, self.scale, None, None, None, 0.1, 128, shape, [1, 1], [1, 1], [1, 1], 1, torch.float32
        )
        h = qdiff.quantize(h.permute(0, 2, 3, 1), self.scale.new_tensor(9.0), 128, 0, 255, 3)
        scale = torch.cat([self.scale, self.scale[:1]])
        return qdiff.linear(
            h, self.packed, scale, self.zero_point, self.shift, None, 0.1, 128, [5, 4], torch.float32
        ).relu()


def test_a_graph_of_them_compiles_whole_and_gives_the_same() -> None:
    small, x = Small(), torch.randn(2, 3, 6, 6)
    compiled = torch.compile(small, fullgraph=True)
    assert torch.equal(compiled(x), small(x))


def test_a_graph_of_them_exports_with_a_dynamic_batch() -> None:
    small, x = Small(), torch.randn(2, 3, 6, 6)
    exported = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    assert torch.equal(exported(torch.cat([x, x + 1])), small(torch.cat([x, x + 1])))
