"""On cuda, autotune=True takes the fastest kernel of every layer and attention; without it the model decides."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qdiff_fx
from qdiff_fx.autotune import cuda
from qdiff_fx.autotune.attention_size import AttentionSize
from qdiff_fx.autotune.layer_size import LayerSize
from qdiff_fx.autotune.timer import Run
from qdiff_fx.checkpoint.timings import TIMINGS_FILE, read_timings, write_timings
from qdiff_fx.errors import BackendError
from qdiff_fx.graph.meta import LayerTiming
from qdiff_fx.kernels.cuda_gpu import GPUS
from qdiff_fx.kernels.cuda_tiles import ATTENTION_TILES, TILES, AttentionTile, Tile
from qdiff_fx.kernels.machine import machine_signature
from qdiff_fx.kernels.triton_kernels import launch
from qdiff_fx.lowering import LoweringReport, lower
from qdiff_fx.passes.lower import cuda_attention, cuda_carrier, cuda_layers
from subjects import Preparer, signal_to_noise, sketch_inputs


class Clock:
    """Stands in for both measures: the last of a layer's kernels is the fastest, `embed` is faster in the carrier."""

    def __init__(self, attention: float = 50.0) -> None:
        self.keys: list[str] = []
        self.attention = attention

    def layer(self, size: LayerSize, kernels: Any, device: torch.device) -> LayerTiming:
        self.keys.append(size.key)
        slow = size.weight_shapes[0] == (8, 2)
        return LayerTiming(integer=20.0, carrier=10.0 if slow else 40.0, kernel=list(kernels)[-1])

    def attend(self, size: AttentionSize, kernels: Any, device: torch.device) -> LayerTiming:
        self.keys.append(size.key)
        return LayerTiming(integer=self.attention, carrier=50.0, kernel=list(kernels)[-1])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cuda, "measure_layer", clock.layer)
    monkeypatch.setattr(cuda, "measure_attention", clock.attend)
    return clock


@pytest.fixture(scope="module")
def prepared(sketch: nn.Module, preparer: Preparer) -> qdiff_fx.PreparedUNet:
    return preparer.fitted(sketch, "w8a8")


@pytest.fixture
def tune(prepared: qdiff_fx.PreparedUNet, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LoweringReport]:
    """Lowers the model as on an H100, without running it."""
    for module in (cuda, cuda_attention, cuda_carrier, cuda_layers):
        monkeypatch.setattr(module, "target_gpu", lambda graph_module: GPUS[(9, 0)])
    model = qdiff_fx.convert(prepared, backend="reference", dtype=torch.float16)
    return lambda timings=None: lower(model.plan, "cuda", model.signature, timings=timings)[1]


def test_the_fastest_kernel_of_each_layer_is_taken_and_reported(tune: Any, clock: Clock) -> None:
    report = tune({})
    rows = {row.layer: row for row in report.rows if row.timing is not None and "attention" not in row.kernel}
    assert {"embed", "wide", "down", "qkv", "project"} <= set(rows)
    for name, row in rows.items():
        if name == "embed":
            assert row.kernel == "aten.linear on dequantized weight"
            assert row.fallback == "timed 20 us on integers, 10 us in float16"
        else:
            assert not row.fallback and row.timing.kernel in row.kernel
    assert rows["project"].timing.kernel == "int_mm"
    assert rows["down"].timing.kernel in {str(tile) for tile in TILES[(9, 0)][False]}
    assert "int8 us  carrier us" in str(report) and "20       40" in str(report)


def test_attention_runs_on_integers_only_where_that_was_timed_faster(tune: Any, clock: Clock) -> None:
    seen = []
    for clock.attention in (60.0, 50.0, 49.0):
        (row,) = (row for row in tune({}).rows if "attention" in row.kernel)
        seen.append((row.kernel, row.fallback.partition(": ")[2]))
    sdpa = "aten.scaled_dot_product_attention"
    assert seen == [
        (sdpa, "timed 60 us on integers, 50 us in float16"),
        (sdpa, "timed 50 us on integers, 50 us in float16"),
        (f"qdiff.cuda_attention {ATTENTION_TILES[64][-1]}", ""),
    ]


def test_known_sizes_are_not_timed_again(tune: Any, clock: Clock) -> None:
    first = tune({})
    count = len(clock.keys)
    assert len(set(clock.keys)) == count > 5
    again = tune(first.timings)
    assert len(clock.keys) == count and str(again) == str(first)
    # A shape that this version does not have is no answer.
    stale = {key: LayerTiming(integer=1.0, carrier=2.0, kernel="8x8x8") for key in first.timings}
    assert tune(stale).timings == first.timings and len(clock.keys) == 2 * count


def test_without_timings_the_model_decides(tune: Any, clock: Clock) -> None:
    report = str(tune())
    assert not clock.keys and "predicted" in report and "timed" not in report


def test_a_tuned_model_computes_the_same_network(prepared: qdiff_fx.PreparedUNet) -> None:
    """With the real measures, in the interpreter: every kernel in question really runs."""
    model = qdiff_fx.convert(prepared, backend="cuda", autotune=True)
    rows = [row for row in model.lowering_report().rows if row.timing]
    assert {"embed", "project", "wide", "down", "qkv"} <= {row.layer for row in rows}
    assert all(row.timing and row.timing.integer > 0 and row.timing.carrier > 0 for row in rows)
    inputs = sketch_inputs(8)
    with torch.no_grad():
        wanted = qdiff_fx.convert(prepared, backend="reference")(*inputs)
        # Fewer roundings than the plan's in layers that left for the carrier, on the same weights.
        assert signal_to_noise(wanted, model(*inputs)) > 20.0


def test_times_are_kept_by_machine(prepared: qdiff_fx.PreparedUNet, clock: Clock, tmp_path: Path) -> None:
    model = qdiff_fx.convert(prepared, backend="cuda", autotune=True)
    qdiff_fx.save(model, tmp_path)
    count = len(clock.keys)
    assert list(json.loads((tmp_path / TIMINGS_FILE).read_text())["machines"]) == [machine_signature(model.device)]
    again = qdiff_fx.load(tmp_path, "cuda", autotune=True)
    assert str(copy.deepcopy(again).lowering_report()) == str(model.lowering_report())
    assert len(clock.keys) == count


def test_a_gpu_is_a_machine_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert machine_signature(torch.device("cuda")) == f"NVIDIA H100; sm_90; torch {torch.__version__}"


def test_a_kernels_name_survives_its_file(tmp_path: Path) -> None:
    times = {"conv2d, 2x4": LayerTiming(integer=1.5, carrier=2.5, kernel=str(TILES[(9, 0)][False][0]))}
    times["linear, 2x4"] = LayerTiming(integer=1.0, carrier=2.0)
    write_timings(tmp_path, {"a GPU": times})
    assert read_timings(tmp_path) == {"a GPU": times}


# ------------------------------------------------------------------------------------------------ measuring itself


def in_order(wanted: Sequence[float], runs: Sequence[Run]) -> list[float]:
    """A clock that runs everything twice and says what it is told."""
    for run in (*runs, *runs):
        run()
    return list(wanted)


GEOMETRY = ([2, 1], [1, 1], [1, 1], 1)
KERNELS = {
    "slow": ("triton", Tile(rows=32, outputs=32, depth=32, warps=4, stages=1)),
    "quick": ("triton", Tile(rows=16, outputs=64, depth=64, warps=4, stages=1)),
}
LINEAR = LayerSize(
    x_shape=(2, 16), weight_shapes=((8, 16),), geometry=None, dtype=torch.float32, quantized_alone=False, weights="int8"
)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("weights", ["int8", "int4", "int4 with shifts"])
@pytest.mark.parametrize("geometry", [GEOMETRY, None])
def test_operands_fit_the_kernels(geometry: Any, weights: str, alone: bool) -> None:
    x_shape, shape = ((1, 7, 5, 6), (9, 7, 3, 3)) if geometry else ((2, 5, 7), (9, 7))
    size = LayerSize(
        x_shape=x_shape,
        weight_shapes=(shape,),
        geometry=geometry,
        dtype=torch.float16,
        quantized_alone=alone,
        weights=weights,
    )
    clock = partial(in_order, [3e-6, 2e-6, 4e-6])
    timing = cuda.measure_layer(size, KERNELS, torch.device("cpu"), clock)
    assert timing == LayerTiming(integer=2.0, carrier=4.0, kernel="quick")


def test_grouped_weights_and_the_vendors_matmul_run_too() -> None:
    grouped = LayerSize(
        x_shape=(1, 6, 4, 4),
        weight_shapes=((4, 3, 3, 3),),
        geometry=([1, 1], [2, 2], [2, 2], 2),
        dtype=torch.float32,
        quantized_alone=False,
        weights="int4 with shifts",
    )
    assert cuda.measure_layer(grouped, KERNELS, torch.device("cpu")).kernel in KERNELS
    kernels = {**KERNELS, "int_mm": ("int_mm", KERNELS["slow"][1])}
    clock = partial(in_order, [3e-6, 2e-6, 1e-6, 4e-6])
    assert cuda.measure_layer(LINEAR, kernels, torch.device("cpu"), clock).kernel == "int_mm"


@pytest.mark.parametrize("mask", [None, ((1, 1, 1, 7), torch.bool), ((5, 7), torch.float16)])
def test_attention_operands_fit_the_kernel(mask: Any) -> None:
    shapes = ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8))
    size = AttentionSize(shapes=shapes, mask=mask, is_causal=mask is None, dtype=torch.float16)
    tile = AttentionTile(queries=32, keys=32, warps=4, stages=1)
    timing = cuda.measure_attention(size, {"only": tile}, torch.device("cpu"), partial(in_order, [5e-6, 3e-6]))
    assert timing == LayerTiming(integer=5.0, carrier=3.0, kernel="only")
    assert ("mask" in size.key) == (mask is not None) and ("causal" in size.key) == (mask is None)


def test_a_kernel_that_does_not_fit_the_gpu_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    actual = launch.linear

    def limited(*arguments: Any) -> None:
        if arguments[-1][0] == 16:
            raise launch.OutOfResources(300_000, 232_448, "shared memory")
        actual(*arguments)

    monkeypatch.setattr(launch, "linear", limited)
    clock = partial(in_order, [3e-6, 4e-6])
    assert cuda.measure_layer(LINEAR, KERNELS, torch.device("cpu"), clock).kernel == "slow"
    assert "quick" in caplog.text and "shared memory" in caplog.text
    with pytest.raises(BackendError, match="none of quick fits this GPU"):
        cuda.measure_layer(LINEAR, {"quick": KERNELS["quick"]}, torch.device("cpu"), clock)
