"""What `inspect` finds agrees with what is built."""

from __future__ import annotations

import pytest
import torch

import qdiff_fx
from qdiff_fx.config import QDiffConfig
from qdiff_fx.report.inspection import Shortcut, ShortcutPart, inspect_prepared
from subjects import unconditional_unet

CALLS = [((torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(t)), t), {}) for t in range(0, 900, 300)]


@pytest.mark.parametrize("preset", ["w4a8", "w8a8"])
def test_bytes_after_are_those_that_conversion_stores(preset: str) -> None:
    unet = unconditional_unet()
    prepared = qdiff_fx.prepare(unet, QDiffConfig.preset(preset))
    qdiff_fx.calibrate(prepared, CALLS, progress=False)
    inspection = inspect_prepared(prepared)
    lowering = qdiff_fx.convert(prepared, backend="reference").lowering_report()
    stored = {row.layer: row.bytes for row in lowering.rows}
    assert {row.name: row.bytes_after for row in inspection.layers} == {
        row.name: stored[row.name] for row in inspection.layers
    }
    assert sum(row.parameters for row in inspection.sizes) == sum(item.numel() for item in unet.parameters())


def test_every_quantized_layer_is_in_one_block() -> None:
    inspection = inspect_prepared(qdiff_fx.prepare(unconditional_unet()))
    in_blocks = [name for block in inspection.blocks for name in block.layers]
    assert sorted(in_blocks) == sorted(row.name for row in inspection.layers if row.weight_bits)


def test_ranges_are_unknown_until_something_is_observed() -> None:
    prepared = qdiff_fx.prepare(unconditional_unet())
    assert [row.range_ratio for row in inspect_prepared(prepared).shortcuts] == [None] * 4
    prepared(*CALLS[0][0])
    assert all(row.range_ratio is not None and row.range_ratio >= 1 for row in inspect_prepared(prepared).shortcuts)


def test_the_ratio_is_wider_span_over_narrower_with_zero_included() -> None:
    parts = (ShortcutPart(channels=4, minimum=1.0, maximum=3.0), ShortcutPart(channels=4, minimum=-1.0, maximum=0.5))
    assert Shortcut(layer="x", parts=parts).range_ratio == 2.0
