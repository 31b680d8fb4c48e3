"""The cuda kernels on a GPU: run by `make gpu`, which sets TRITON_INTERPRET=0."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from cuda_cases import STORED, AttentionCase, LayerCase, prepare_attention, prepare_layer
from qdiff_fx.kernels.cuda_gpu import gpu_for
from qdiff_fx.kernels.cuda_tiles import TILES, Product, attention_tiles, layer_tiles
from qdiff_fx.numerics.attention import attend
from qdiff_fx.numerics.spec import QuantSpec

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "0" or not torch.cuda.is_available(), reason="not asked to run on a GPU"
)

SHAPES = {
    "3x3": LayerCase(channels=64, outputs=96, height=16, width=17, embedding=True, residual=True),
    "deep 3x3": LayerCase(channels=256, outputs=128, height=8, width=8, embedding=True, requantize=True),
    "3x3 stride 2": LayerCase(channels=64, outputs=64, height=17, width=16, stride=(2, 2), requantize=True),
    "1x1": LayerCase(channels=320, outputs=128, kernel=(1, 1), padding=(0, 0), residual=True),
    "linear": LayerCase(channels=320, outputs=192, kernel=None, height=77, requantize=True),
    "odd": LayerCase(channels=37, outputs=45, height=9, width=5, padding=(2, 1), bias=False),
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("carrier", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_every_tile_gives_the_references_bits(name: str, carrier: torch.dtype, stored: str) -> None:
    gpu = gpu_for(torch.cuda.get_device_capability())
    case = replace(SHAPES[name], stored=stored, carrier=carrier, device="cuda")
    prepared, packed = prepare_layer(case), stored != "int8"
    product = Product(
        rows=1, outputs=case.outputs, depth=case.channels, packed=packed, stride_one=case.stride == (1, 1)
    )
    for tile in {*TILES[gpu.capability][packed], *layer_tiles(product, gpu)}:
        for _ in range(3):  # programs that share a sum arrive in another order each time
            assert torch.equal(prepared.run(tile=tile.arguments), prepared.wanted), tile


def test_int_mm_gives_the_references_bits() -> None:
    for rows in (1, 17, 300):
        case = LayerCase(kernel=None, batch=1, height=rows, channels=64, outputs=96, residual=True, device="cuda")
        prepared = prepare_layer(case)
        assert torch.equal(prepared.run(kernel="int_mm"), prepared.wanted)


@pytest.mark.parametrize("stored", STORED)
def test_a_captured_graph_replays_on_new_inputs(stored: str) -> None:
    prepared = prepare_layer(replace(SHAPES["3x3"], stored=stored, device="cuda"))
    x = prepared.arguments[0].clone()
    prepared.operator(x, *prepared.arguments[1:])  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = prepared.operator(x, *prepared.arguments[1:])
    x.zero_()
    graph.replay()
    assert not torch.equal(result.cpu(), prepared.wanted)
    x.copy_(prepared.arguments[0])
    graph.replay()
    assert torch.equal(result.cpu(), prepared.wanted)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("head", [40, 64, 80, 160])
def test_attention_is_that_of_the_reference_but_for_a_few_steps(head: int, mask: str | None) -> None:
    gpu = gpu_for(torch.cuda.get_device_capability())
    case = AttentionCase(queries=200, keys=177, head=head, value_head=head, mask=mask, device="cuda")
    prepared = prepare_attention(case)
    query, key, value = (item.float() for item in prepared.real())
    wanted = attend(query, key, value, prepared.mask, False, None, QuantSpec(bits=8, symmetric=True))
    for tile in attention_tiles(head, gpu):
        arguments = [*prepared.arguments[:-2], tile.arguments, prepared.arguments[-1]]
        result = torch.ops.qdiff.cuda_attention.default(*arguments).cpu()
        # Three probabilities a step off: 1/255 of a value of at most 128 * 0.05 each.
        assert (result - wanted).abs().max() <= 3 * 128 * 0.05 / 255, tile
