"""autotune=True takes the faster kernel a layer, times equal sizes once, and keeps the times by machine."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdiff_fx
from qdiff_fx import model
from qdiff_fx.autotune import x86
from qdiff_fx.autotune.layer_size import LayerSize
from qdiff_fx.autotune.x86 import measure
from qdiff_fx.checkpoint.timings import TIMINGS_FILE
from qdiff_fx.config import QDiffConfig
from qdiff_fx.errors import CheckpointError, DiskError, InputError
from qdiff_fx.graph.meta import LayerTiming
from qdiff_fx.kernels import BACKENDS
from qdiff_fx.kernels.x86_native import AVX2, VNNI
from subjects import PLAIN, sketch_inputs

_REASON = BACKENDS["x86"].unavailable("cpu")
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


class Clock:
    """Stands in for `measure`: linears are faster in the carrier type, convolutions on integers."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def __call__(self, size: LayerSize) -> LayerTiming:
        self.keys.append(size.key)
        return LayerTiming(integer=20.0, carrier=15.0 if size.geometry is None else 40.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(x86, "measure", clock)
    return clock


@pytest.fixture(scope="module")
def prepared(sketch: nn.Module, preparer: Any) -> qdiff_fx.PreparedUNet:
    result: qdiff_fx.PreparedUNet = preparer.fitted(sketch)
    return result


def test_layers_of_4_bits_are_timed_apart_where_products_saturate(
    sketch: nn.Module, preparer: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernels, wanted in ((AVX2, True), (VNNI, False)):
        clock.keys.clear()
        monkeypatch.setattr(x86, "native_kernels", lambda kernels=kernels: kernels)
        qdiff_fx.convert(preparer.fitted(sketch, "w4a8"), backend="x86", autotune=True)
        assert any("int4" in key for key in clock.keys) is wanted


def test_the_faster_kernel_is_taken_and_reported(prepared: qdiff_fx.PreparedUNet, clock: Clock) -> None:
    tuned = qdiff_fx.convert(prepared, backend="x86", autotune=True)
    plain = qdiff_fx.convert(prepared, backend="x86")
    rows = {row.layer: row for row in tuned.lowering_report().rows}
    timed = {name: row for name, row in rows.items() if row.timing is not None}
    assert {"embed", "project", "wide", "down"} <= set(timed)
    assert "qkv" not in timed  # a conv1d reads its codes through a view
    for name, row in timed.items():
        linear = name in ("embed", "project")
        kernels = (
            ["aten.linear on dequantized weight"]
            if linear
            else [f"qdiff.{kernels}_conv2d" for kernels in ("x86", "vnni", "avx2")]
        )
        assert row.kernel in kernels
        assert row.fallback == ("timed 20 us on integers, 15 us in float32" if linear else "")
    text = str(tuned.lowering_report())
    assert "int8 us  carrier us" in text and "20       15" in text
    assert "int8 us" not in str(plain.lowering_report())
    assert tuned.plan.code == plain.plan.code
    inputs = sketch_inputs()
    full = qdiff_fx.convert(prepared, backend="reference")(*inputs)
    # Fewer roundings than the plan's, on the same weights.
    assert (tuned(*inputs) - full).abs().max() < 0.1 * full.abs().max()


class Embedding(nn.Module):
    """Hands timestep arithmetic, float32 in every carrier, to a linear without a cast."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Linear(2, 8), nn.Conv2d(2, 8, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        level = timestep[:, None] / 1000
        waves = torch.cat([torch.sin(level), torch.cos(level)], dim=1)
        return torch.sigmoid(self.conv(sample)) * self.embed(waves)[:, :, None, None]


@pytest.mark.parametrize("preset", ["w8a8", "w8a32"])  # kept by its time, and by its config
def test_a_layer_kept_in_a_narrow_carrier_takes_timestep_arithmetic(preset: str, clock: Clock) -> None:
    inputs, config = sketch_inputs(), QDiffConfig.preset(preset, **PLAIN)
    prepared = qdiff_fx.prepare(Embedding().eval(), config, example_inputs=inputs)
    qdiff_fx.calibrate(prepared, [(inputs, {})], progress=False)
    tuned = qdiff_fx.convert(prepared, backend="x86", autotune=True, dtype=torch.bfloat16)
    (row,) = (row for row in tuned.lowering_report().rows if row.layer == "embed")
    assert row.kernel == "aten.linear on dequantized weight" and ("timed" in row.fallback) is (preset == "w8a8")
    assert (tuned(*inputs) - prepared(*inputs)).abs().max() < 0.05


def test_layers_are_timed_at_the_sizes_of_calibration(
    sketch: nn.Module, preparer: Any, clock: Clock, tmp_path: Path
) -> None:
    prepared = preparer(sketch, QDiffConfig.preset("w8a8", **PLAIN), example_inputs=sketch_inputs())
    calls = [((torch.randn(2, 2, 12, 16), torch.tensor([1.0, 999.0])), {})]
    qdiff_fx.calibrate(prepared, calls, progress=False)
    qdiff_fx.save(qdiff_fx.convert(prepared, backend="x86", autotune=True), tmp_path)
    assert any("2x8x12x16" in key for key in clock.keys) and not any("2x8x8x8" in key for key in clock.keys)
    (tmp_path / TIMINGS_FILE).unlink()
    timed = sorted(clock.keys)
    clock.keys.clear()
    qdiff_fx.load(tmp_path, "x86", autotune=True)
    assert sorted(clock.keys) == timed


def test_equal_sizes_are_timed_once_and_copies_are_not_timed(prepared: qdiff_fx.PreparedUNet, clock: Clock) -> None:
    tuned = qdiff_fx.convert(prepared, backend="x86", autotune=True)
    assert len(clock.keys) == len(set(clock.keys)) > 3
    count = len(clock.keys)
    clone = copy.deepcopy(tuned)
    assert str(clone.lowering_report()) == str(tuned.lowering_report())
    assert len(clock.keys) == count


def test_without_it_nothing_is_timed_or_kept(prepared: qdiff_fx.PreparedUNet, clock: Clock, tmp_path: Path) -> None:
    plain = qdiff_fx.convert(prepared, backend="x86")
    qdiff_fx.save(plain, tmp_path)
    qdiff_fx.load(tmp_path, "x86")
    qdiff_fx.convert(prepared, backend="reference", autotune=True)
    assert not clock.keys and not (tmp_path / TIMINGS_FILE).exists()


def test_times_are_kept_by_machine(
    prepared: qdiff_fx.PreparedUNet, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = qdiff_fx.convert(prepared, backend="x86", autotune=True)
    qdiff_fx.save(tuned, tmp_path)
    count = len(clock.keys)
    first = json.loads((tmp_path / TIMINGS_FILE).read_text())
    again = qdiff_fx.load(tmp_path, "x86", autotune=True)
    assert len(clock.keys) == count
    assert str(again.lowering_report()) == str(tuned.lowering_report())
    assert "timed" not in str(qdiff_fx.load(tmp_path, "x86").lowering_report())

    monkeypatch.setattr(model, "machine_signature", lambda device: "another machine")
    qdiff_fx.load(tmp_path, "x86", autotune=True)
    assert len(clock.keys) == 2 * count
    second = json.loads((tmp_path / TIMINGS_FILE).read_text())
    assert second["machines"].items() > first["machines"].items() and "another machine" in second["machines"]

    def full_disk(*_: Any) -> None:
        raise DiskError("no space")

    monkeypatch.setattr(model, "machine_signature", lambda device: "a third machine")
    monkeypatch.setattr(model, "write_timings", full_disk)
    qdiff_fx.load(tmp_path, "x86", autotune=True)  # the model runs; its times are taken again next time
    assert json.loads((tmp_path / TIMINGS_FILE).read_text()) == second


def test_it_contradicts_strict(prepared: qdiff_fx.PreparedUNet) -> None:
    with pytest.raises(InputError, match=r"strict=True.*autotune=True"):
        qdiff_fx.convert(prepared, backend="x86", autotune=True, strict=True)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"format_version": 2, "machines": {}}',
        '{"format_version": 1, "machines": {}, "more": 1}',
        '{"format_version": 1, "machines": []}',
        '{"format_version": 1, "machines": {"m\\n": {}}}',
        '{"format_version": 1, "machines": {"m": {"k": [1.0]}}}',
        '{"format_version": 1, "machines": {"m": {"k": [1.0, -1.0]}}}',
        '{"format_version": 1, "machines": {"m": {"k": [1.0, NaN]}}}',
        '{"format_version": 1, "machines": {"m": {"k": [1.0, 1e999]}}}',
        '{"format_version": 1, "machines": {"m": {"k": ["1", true]}}}',
        '{"format_version": 1, "machines": {"m": {"k": [1.0, 2.0, ""]}}}',
        '{"format_version": 1, "machines": {"m": {"k": [1.0, 2.0, "kernel", "more"]}}}',
        '{"format_version": 1, "machines": {"m": {"k": [1.0, 2.0, "a\\n"]}}}',
    ],
)
def test_other_files_are_refused(
    prepared: qdiff_fx.PreparedUNet, tmp_path: Path, content: str, converted: qdiff_fx.QuantizedUNet
) -> None:
    qdiff_fx.save(converted, tmp_path)
    (tmp_path / TIMINGS_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=TIMINGS_FILE):
        qdiff_fx.load(tmp_path, "x86", autotune=True)
    qdiff_fx.load(tmp_path, "x86")


@pytest.fixture(scope="module")
def converted(prepared: qdiff_fx.PreparedUNet) -> qdiff_fx.QuantizedUNet:
    return qdiff_fx.convert(prepared, backend="reference")


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("x_shape", "weights", "geometry"),
    [
        ((2, 16, 8, 8), ((8, 16, 3, 3),), ([1, 1], [1, 1], [1, 1], 1)),
        ((2, 16, 7, 7), ((8, 4, 3, 3),), ([2, 2], [0, 0], [1, 1], 4)),
        ((2, 5, 16), ((8, 16), (24, 16)), None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_gives_two_times(x_shape: Any, weights: Any, geometry: Any, dtype: torch.dtype, alone: bool) -> None:
    size = LayerSize(x_shape=x_shape, weight_shapes=weights, geometry=geometry, dtype=dtype, quantized_alone=alone)
    timing = measure(size)
    assert 0 < timing.integer < 1e6 and 0 < timing.carrier < 1e6
