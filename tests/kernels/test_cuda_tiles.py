"""Block shapes fit their GPUs, and the choice among them goes by the layer's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qdiff_fx.kernels.cuda_gpu import GPUS, Capability, Gpu, gpu_for, refusal
from qdiff_fx.kernels.cuda_model import (
    AttentionWork,
    LayerWork,
    carrier_attention,
    carrier_layer,
    integer_attention,
    integer_layer,
    vendor_integer_layer,
)
from qdiff_fx.kernels.cuda_tiles import (
    DESCRIPTOR_TILES,
    TILES,
    Product,
    attention_tiles,
    interpreter_tile,
    layer_tiles,
    pixel_block,
    ranked_tiles,
)
from qdiff_fx.passes.lower.cuda_carrier import PREDICTED_MARGIN

ROOT = Path(__file__).resolve().parents[2]
H100 = GPUS[(9, 0)]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.architecture)
def test_every_tile_fits_its_gpu(gpu: Gpu) -> None:
    for tables in (TILES[gpu.capability], DESCRIPTOR_TILES.get(gpu.capability, {})):
        for packed, tiles in tables.items():
            for tile in tiles:
                assert tile.shared_memory(packed) <= gpu.shared_memory and tile.depth >= 32


def test_descriptor_tiles_are_for_layers_that_a_descriptor_can_tell() -> None:
    def kinds(depth: int, **changes: Any) -> set[bool]:
        product = Product(rows=8192, outputs=640, depth=depth, taps=9, **changes)
        return {tile.descriptors for tile in layer_tiles(product, H100)}

    assert kinds(320) == kinds(16) == kinds(640, packed=True) == {True}
    assert kinds(36) == kinds(320, groups=2) == kinds(320, stride_one=False) == {False}
    assert kinds(320, packed=True) == {False}, "160 bytes are no whole number of steps"
    product = Product(rows=8192, outputs=640, depth=640)
    assert not any(tile.descriptors for gpu in GPUS.values() if gpu is not H100 for tile in layer_tiles(product, gpu))


@pytest.mark.parametrize(
    ("rows", "size", "block"),
    [
        (128, (2, 64, 64), (1, 2, 64)),
        (128, (2, 8, 8), (2, 8, 8)),
        (128, (1, 1, 5000), (1, 1, 128)),
        (64, (2, 9, 7), (1, 8, 8)),
        (64, (64, 97, 97), (1, 8, 8)),
        (128, (3, 4, 4), (4, 4, 8)),
        (256, (2, 96, 96), (1, 8, 32)),
        (32, (1, 1, 1), (1, 1, 32)),
    ],
)
def test_a_block_of_pixels_leaves_few_outside(
    rows: int, size: tuple[int, int, int], block: tuple[int, int, int]
) -> None:
    assert pixel_block(rows, *size) == block


def test_a_split_pays_where_few_tiles_have_much_depth() -> None:
    deep = Product(rows=128, outputs=1280, depth=1280, taps=9)
    flat = Product(rows=8192, outputs=320, depth=320)
    assert ranked_tiles(deep, H100)[0].split > 1 and ranked_tiles(flat, H100)[0].split == 1


def test_large_layers_get_large_tiles_and_small_ones_enough_blocks() -> None:
    large = ranked_tiles(Product(rows=8192, outputs=640, depth=640, taps=9), H100)[0]
    small = ranked_tiles(Product(rows=128, outputs=1280, depth=1280, taps=9), H100)[0]
    assert large.rows * large.outputs == 128 * 128
    assert small.rows * small.outputs < large.rows * large.outputs


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.architecture)
def test_packed_weights_of_groups_or_of_ragged_rows_get_narrow_tiles(gpu: Gpu) -> None:
    def widest(depth: int, *, groups: int = 1, packed: bool = True) -> int:
        product = Product(rows=8192, outputs=640, depth=depth, taps=9, groups=groups, packed=packed)
        assert set(ranked_tiles(product, gpu)) <= set(layer_tiles(product, gpu))
        by_threads = {tile for tile in layer_tiles(product, gpu) if not tile.descriptors}
        assert by_threads <= set(TILES[gpu.capability][packed])
        return max(max(tile.rows, tile.outputs) for tile in layer_tiles(product, gpu))

    assert widest(320, groups=2) == widest(36) == widest(5) == 64
    assert widest(320) == widest(320, groups=2, packed=False) == widest(5, packed=False) == 128


@pytest.mark.parametrize(
    ("head", "capability", "tile"),
    [
        (40, (8, 0), (64, 64, 8, 3)),
        (160, (9, 0), (64, 64, 8, 2)),
        (512, (8, 0), (64, 32, 8, 1)),
        (512, (9, 0), (32, 32, 4, 1)),
    ],
)
def test_attention_has_a_tile_for_every_head(head: int, capability: Capability, tile: tuple[int, ...]) -> None:
    assert attention_tiles(head, GPUS[capability])[0].arguments == list(tile)


def test_an_interpreter_tile_covers_the_layer() -> None:
    tile = interpreter_tile(Product(rows=40, outputs=20, depth=5))
    assert (tile.rows, tile.outputs, tile.depth) == (64, 32, 32)


@pytest.mark.parametrize(
    ("capability", "architecture"), [((8, 0), "sm_80"), ((8, 7), "sm_86"), ((9, 0), "sm_90"), ((12, 0), "sm_100")]
)
def test_an_unlisted_gpu_is_taken_for_the_nearest_older_one(capability: tuple[int, int], architecture: str) -> None:
    assert refusal(capability) is None and gpu_for(capability).architecture == architecture


def test_old_gpus_are_refused_with_the_reason() -> None:
    assert "sm_75, want sm_80" in (refusal((7, 5)) or "")


def test_a_floor_is_the_longer_of_operations_and_bytes() -> None:
    work = LayerWork(product=Product(rows=1000, outputs=100, depth=50), input_elements=50_000)
    estimate = integer_layer(work, H100)
    assert estimate.operations == 2 * 1000 * 100 * 50
    assert estimate.bytes == 50_000 + 5_000 + 2 * 100_000
    assert estimate.floor == max(1e7 / 1979e12, 255_000 / 3350e9) and estimate.bound == "compute"
    assert integer_layer(replace(work, input_elements=10**9), H100).bound == "memory"
    assert carrier_layer(work, H100).bytes == 2 * (50_000 + 5_000 + 100_000)


def test_packed_weights_halve_their_bytes_and_a_quantize_step_of_its_own_costs() -> None:
    work = LayerWork(product=Product(rows=2, outputs=1000, depth=1000, packed=True), input_elements=2000)
    alone = LayerWork(product=work.product, input_elements=2000, quantized_alone=True)
    assert integer_layer(work, H100).bytes == 2000 + 500_000 + 4000
    assert integer_layer(alone, H100).bytes - integer_layer(work, H100).bytes == 3 * 2000


def test_large_convolutions_win_on_integers_and_small_projections_of_another_layers_output_do_not() -> None:
    conv = LayerWork(product=Product(rows=8192, outputs=320, depth=320, taps=9), input_elements=8192 * 320)
    skip = LayerWork(
        product=Product(rows=8192, outputs=320, depth=1280), input_elements=8192 * 1280, quantized_alone=True
    )
    assert integer_layer(conv, H100).predicted < 0.8 * carrier_layer(conv, H100).predicted
    assert PREDICTED_MARGIN * integer_layer(skip, H100).predicted > carrier_layer(skip, H100).predicted


def test_the_vendors_matmul_pays_for_its_int32_result() -> None:
    wide = LayerWork(product=Product(rows=8192, outputs=5120, depth=640), input_elements=8192 * 640)
    deep = LayerWork(product=Product(rows=512, outputs=1280, depth=20480), input_elements=512 * 20480)
    assert vendor_integer_layer(wide, H100).predicted > integer_layer(wide, H100).predicted
    assert vendor_integer_layer(deep, H100).predicted < integer_layer(deep, H100).predicted


def test_attention_with_small_heads_is_bound_by_the_work_a_score() -> None:
    work = AttentionWork(heads=16, queries=4096, keys=4096, head=40)
    assert integer_attention(work, H100).bound == "vector"
    assert integer_attention(work, H100).predicted > carrier_attention(work, H100).predicted


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kernel_compiles_for_every_gpu_without_spilling(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join(item for item in sys.path if item),
    }
    command = [sys.executable, "benchmarks/cuda_kernels.py", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert {row["architecture"] for row in rows} == {gpu.architecture for gpu in GPUS.values()}
    assert all(row["spilled"] == 0 and (row["instructions"] > 0) == row["product"] for row in rows)
    assert {row["kernel"].split()[0].rstrip(",") for row in rows} == {"W8", "W4", "attention", "scores", "rescale"}
