"""The lowering report names what every layer and attention runs on, in bytes that add up."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import qdiff_fx
from qdiff_fx import model
from qdiff_fx.config import LayerRule
from qdiff_fx.errors import BackendError
from qdiff_fx.lowering import LoweringReport
from subjects import Preparer, calls_of, sketch_inputs


@pytest.fixture(scope="module")
def quantized(preparer: Preparer, sketch: nn.Module) -> qdiff_fx.QuantizedUNet:
    return qdiff_fx.convert(preparer.fitted(sketch, "w4a8"), backend="reference")


def test_every_layer_and_attention_has_a_row_in_execution_order(quantized: qdiff_fx.QuantizedUNet) -> None:
    rows = quantized.lowering_report().rows
    attention = "simulated: quantized operands, products in the carrier type"
    assert {row.layer or "attention": (row.kernel, row.dtype, row.fallback) for row in rows} == {
        "embed": ("qdiff.linear", "int8", ""),
        "stem": ("aten.conv2d on dequantized weight", "int8", ""),
        "wide": ("qdiff.conv2d", "int4", ""),
        "down": ("qdiff.conv2d", "int4", ""),
        "qkv": ("qdiff.conv2d", "int4", ""),
        "scaled_dot_product_attention": ("qdiff.attention", "float32", attention),
        "project": ("qdiff.linear", "int4", ""),
        "skip#0": ("qdiff.conv2d", "int4", ""),
        "skip#1": ("qdiff.conv2d", "int4", ""),
        "head": ("aten.conv2d on dequantized weight", "int8", ""),
    }
    order = [node.name for node in quantized.lowered.graph.nodes]
    assert [row.node for row in rows] == sorted((row.node for row in rows), key=order.index)


def test_bytes_are_those_of_the_stored_tensors(quantized: qdiff_fx.QuantizedUNet, sketch: nn.Module) -> None:
    sizes = {row.layer: row.bytes for row in quantized.lowering_report().rows}
    # 8 x 4 x 3 x 3 codes in two to a byte; per output channel a float32 scale, a zero point, a float32 bias.
    assert sizes["wide"] == 8 * 4 * 9 // 2 + 8 * (4 + 1 + 4)
    assert sizes["project"] == 8 * 8 // 2 + 8 * (4 + 1)
    assert sizes["stem"] == 8 * 2 * 9 + 8 * (4 + 4)
    assert sizes["skip#0"] - sizes["skip#1"] == 8 * 4, "the bias went to the first part"
    assert quantized.lowering_report().total_bytes == sum(sizes.values())


def test_the_table_has_a_line_a_row_and_a_summary(quantized: qdiff_fx.QuantizedUNet) -> None:
    report = quantized.lowering_report()
    lines = str(report).splitlines()
    header = ["layer", "kernel", "dtype", "bytes", "fallback", "why these widths"]
    assert re.split(" {2,}", lines[0]) == header and set(lines[1]) == {"-", " "}
    assert len(lines) == len(report.rows) + 3
    assert lines[-1] == f"backend reference: {len(report.rows)} nodes, {report.total_bytes:,} bytes"
    assert lines[2].startswith(report.rows[0].layer)


def test_a_layer_with_widths_of_its_own_says_why(preparer: Preparer, sketch: nn.Module) -> None:
    prepared = preparer(sketch, qdiff_fx.QDiffConfig(weight_slack=0.2), example_inputs=sketch_inputs())
    report = qdiff_fx.calibrate(prepared, calls_of(sketch), progress=False)
    lowering = qdiff_fx.convert(prepared, backend="reference").lowering_report()
    reasons = {row.layer: row.reason for row in lowering.rows}
    assert reasons["stem"] == "boundary: reads the noisy sample" and reasons["scaled_dot_product_attention"] == ""
    assert report.raises and all(row["reason"] in reasons[layer] for row in report.raises for layer in row["layers"])
    assert report.raises[0]["reason"] in str(lowering)


def test_an_empty_report_still_prints() -> None:
    assert str(LoweringReport(backend="reference", rows=())).endswith("backend reference: 0 nodes, 0 bytes")


def test_layers_that_no_one_quantized_say_their_carrier(preparer: Preparer, sketch: nn.Module) -> None:
    prepared = preparer.fitted(sketch, rules=(LayerRule(module="wide", weight_bits=32),))
    rows = {row.layer: row for row in qdiff_fx.convert(prepared, backend="reference").lowering_report().rows}
    assert (rows["wide"].kernel, rows["wide"].dtype) == ("aten.conv2d", "float32")
    assert rows["wide"].bytes == 4 * (8 * 4 * 9 + 8)


def test_strict_allows_simulation_and_the_reference_has_no_other_fallback(
    preparer: Preparer, sketch: nn.Module
) -> None:
    quantized = qdiff_fx.convert(preparer.fitted(sketch), backend="reference", strict=True)
    assert [row.simulated for row in quantized.lowering_report().rows if row.fallback] == [True]


def test_strict_names_the_first_layer_that_falls_back(
    preparer: Preparer, sketch: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = model.lower

    def lame(*arguments: object, **options: object) -> object:
        lowered, report = lower(*arguments, **options)  # type: ignore[arg-type]
        rows = tuple(replace(row, fallback="too wide" if row.layer == "wide" else row.fallback) for row in report.rows)
        return lowered, replace(report, rows=rows)

    monkeypatch.setattr(model, "lower", lame)
    prepared = preparer.fitted(sketch)
    assert qdiff_fx.convert(prepared, backend="reference").lowering_report().rows
    with pytest.raises(BackendError, match=r"strict=True: 1 nodes fall back .*, the first is wide: too wide"):
        qdiff_fx.convert(prepared, backend="reference", strict=True)


def test_lowering_shares_the_plans_tensors(quantized: qdiff_fx.QuantizedUNet) -> None:
    plan = {tensor.data_ptr() for tensor in quantized.plan.state_dict().values() if tensor.numel()}
    lowered = {tensor.data_ptr() for tensor in quantized.lowered.state_dict().values() if tensor.numel()}
    assert lowered <= plan
    inputs = sketch_inputs()
    (wanted,) = quantized.plan(*quantized.signature.flatten(inputs, {}))
    assert torch.equal(quantized(*inputs), wanted)
