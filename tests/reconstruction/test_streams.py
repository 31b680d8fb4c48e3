"""The streams run each block once a stream, keep only live tensors, and hold what both share once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.reconstruction.cache import ActivationCache
from qdiff_fx.reconstruction.streams import FULL, QUANTIZED, Streams
from qdiff_fx.reconstruction.subgraph import Unit, partition
from subjects import calls_of

ROWS = 8


@pytest.fixture
def opened(conditional: nn.Module, preparer: Any) -> tuple[Streams, tuple[Unit, ...]]:
    """Both streams of a conditional network, at the graph's inputs."""
    prepared = preparer.fitted(conditional)
    units = partition(prepared.graph_module)
    streams = Streams(prepared.graph_module, units, ActivationCache(2**40), batch_size=4)
    calls = [prepared.signature.flatten(args, kwargs) for args, kwargs in calls_of(conditional)[:2]]
    streams.load(prepared.signature.names, calls, ROWS)
    return streams, units


def _sweep(streams: Streams, units: tuple[Unit, ...]) -> list[set[str]]:
    """Advance to the end; the live keys of the cache after every unit."""
    live = []
    for unit in units:
        streams.advance(unit, FULL, QuantizerMode.PASS)
        streams.release_full_inputs(unit)
        streams.advance(unit, QUANTIZED, QuantizerMode.QUANTIZE)
        streams.release(unit)
        live.append(set(streams.cache._tensors))
    return live


def test_no_block_runs_more_than_once_a_stream_and_row(
    opened: tuple[Streams, tuple[Unit, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, units = opened
    rows: Counter[tuple[str, QuantizerMode]] = Counter()
    run = Unit.run

    def counted(unit: Unit, inputs: list[torch.Tensor], weights: list[torch.Tensor], mode: QuantizerMode) -> Any:
        rows[unit.name, mode] += max(len(value) for value in inputs)
        return run(unit, inputs, weights, mode)

    monkeypatch.setattr(Unit, "run", counted)
    _sweep(streams, units)
    assert set(rows.values()) == {ROWS}
    assert len(rows) == 2 * len({unit.name for unit in units})


def test_only_what_a_later_block_reads_stays(opened: tuple[Streams, tuple[Unit, ...]]) -> None:
    streams, units = opened
    for unit, live in zip(units, _sweep(streams, units), strict=True):
        read_later = {name for later in units[unit.index + 1 :] for name in later.inputs}
        assert {key.partition(":")[2] for key in live} <= read_later, unit.name
    assert streams.cache.memory_bytes == 0


def test_conditioning_that_many_blocks_read_is_stored_once(opened: tuple[Streams, tuple[Unit, ...]]) -> None:
    streams, units = opened
    context = "encoder_hidden_states"
    readers = [unit for unit in units if context in unit.inputs]
    assert len(readers) == 4
    assert streams.tensor(FULL, context) is streams.tensor(QUANTIZED, context)
    assert [key for key in streams.cache._tensors if key.endswith(context)] == [f"{FULL}:{context}"]


def test_targets_are_full_precision_and_inputs_are_not(opened: tuple[Streams, tuple[Unit, ...]]) -> None:
    streams, units = opened
    for unit in units[:4]:
        streams.advance(unit, FULL, QuantizerMode.PASS)
        streams.advance(unit, QUANTIZED, QuantizerMode.QUANTIZE)
    name = units[3].outputs[0]
    full, quantized = streams.tensor(FULL, name), streams.tensor(QUANTIZED, name)
    error = float((full - quantized).norm() / full.norm())
    assert 0.001 < error < 1.0
    rows = torch.tensor([5, 2])
    assert torch.equal(streams.gather(FULL, [name], rows, full.device)[0], full[rows])
    assert streams.gather(FULL, [name], slice(2, 4), full.device)[0].data_ptr() == full[2:4].data_ptr()
