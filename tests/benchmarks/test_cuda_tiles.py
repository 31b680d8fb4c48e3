"""The page of layers by block shape, from times that are there; taking them needs a GPU."""

from __future__ import annotations

import cuda_tiles


def test_the_page_sums_what_every_layer_takes_with_its_fastest_tile() -> None:
    rows = {
        "a": {
            "rows": 8192,
            "weight": [640, 640, 3, 3],
            "counts": {"sd15": 2, "sdxl": 1},
            "microseconds": {"W8 small": 90.0, "W8 large": 80.0, "W4 large": 100.0, "fp16": 160.0},
        },
        "b": {
            "rows": 2048,
            "weight": [640, 640],
            "counts": {"sd15": 10},
            "microseconds": {"W8 small": 5.0, "W4 small": 8.0, "fp16": 6.0},
        },
    }
    page = cuda_tiles.page({"device": "a GPU", "layers": rows, "counts": {"sd15": 13, "sdxl": 1}})
    assert (
        "sd15: 12 of 13 layers, 2 sizes, together 0.38 ms in fp16, 0.21 (1.81x) at W8A8, 0.28 (1.36x) at W4A8" in page
    )
    assert "| 8192 | 640x640x3x3 | 2, 1 | 160.0 | 80.0 | 2.00x | 38% | large | 100.0 | 1.60x | large |" in page
    assert page.index("640x640x3x3") < page.index("| 2048 |"), "longest first"


def test_a_layers_rows_follow_from_its_geometry() -> None:
    layers = cuda_tiles.counted_layers(["tiny"])
    down = next(layer for layer in layers.values() if layer.size.geometry and layer.size.geometry[0] == [2, 2])
    assert (down.product.rows, down.product.taps, down.product.packed) == (2 * 4 * 4, 9, False)
    assert not down.product.stride_one and not down.product.describable
    context = next(layer for layer in layers.values() if layer.size.x_shape == (2, 7, 8))
    assert (context.product.rows, context.product.depth, context.product.stride_one) == (14, 8, True)
    assert all(layer.counts["tiny"] > 0 and layer.size.key == key for key, layer in layers.items())
