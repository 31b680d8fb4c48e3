"""Two streams of block inputs: full precision, and with everything upstream quantized. Neither re-runs the prefix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from qdiff_fx.errors import CalibrationError
from qdiff_fx.fake_quantize import ActivationQuantizer, AttentionQuantizer, QuantizerMode, WeightQuantizer
from qdiff_fx.reconstruction.cache import ActivationCache
from qdiff_fx.reconstruction.subgraph import Unit

FULL, QUANTIZED = "full", "quantized"


class Streams:
    """The live tensors of both streams. What does not depend on any quantizer is held once, for both.

    Args:
      graph_module: prepared; tells what depends on quantizers.
      units: of the graph, in order.
      cache: holds the tensors.
      batch_size: rows of a forward pass.
    """

    def __init__(
        self, graph_module: fx.GraphModule, units: Sequence[Unit], cache: ActivationCache, *, batch_size: int
    ) -> None:
        self.cache, self.batch_size, self.rows = cache, batch_size, 0
        self.constants: dict[str, Tensor] = {}
        self._quantized = _depends_on_quantizers(graph_module)
        self._rowwise = _rowwise(graph_module)
        self._last_reader = {name: unit.index for unit in units for name in unit.inputs}

    def load(self, names: Sequence[str], calls: Iterable[Sequence[Tensor]], rows: int) -> None:
        """Take in the graph's inputs: `calls` of some rows each, `rows` together; those that no unit reads are left.

        Raises: CalibrationError if calls differ in shape, or in an input without batch dimension.
        """
        self.rows, start = rows, 0
        for call in calls:
            count = next(len(value) for name, value in zip(names, call, strict=True) if name in self._rowwise)
            for name, value in zip(names, call, strict=True):
                if name in self._last_reader:
                    self._write(FULL, name, value, start, count)
            start += count

    def tensor(self, stream: str, name: str) -> Tensor:
        """[N, ...] of a node in a stream; one without batch dimension as it is."""
        return self.constants[name] if name in self.constants else self.cache[self._key(stream, name)]

    def gather(self, stream: str, names: Sequence[str], rows: Tensor | slice, device: torch.device) -> list[Tensor]:
        """The named tensors at some rows: a copy for an index tensor, a view for a slice."""
        found = []
        for name in names:
            value = self.tensor(stream, name)
            if name not in self.constants:
                value = value[rows] if isinstance(rows, slice) else value.index_select(0, rows.to(value.device))
            found.append(value.to(device))
        return found

    def chunks(self) -> list[slice]:
        """All rows in order, a forward pass each."""
        return [slice(start, min(start + self.batch_size, self.rows)) for start in range(0, self.rows, self.batch_size)]

    @torch.no_grad()
    def advance(self, unit: Unit, stream: str, mode: QuantizerMode) -> None:
        """Compute the unit's outputs for every row and keep them."""
        pending = [name for name in unit.outputs if not self._shares(stream, name)]
        if not pending:
            return
        weights = unit.full_weights if stream == FULL else unit.quantized_weights
        for chunk in self.chunks():
            outputs = unit.run(self.gather(stream, unit.inputs, chunk, unit.device), weights, mode)
            for name, value in zip(unit.outputs, outputs, strict=True):
                if name in pending:
                    self._write(stream, name, value, chunk.start, chunk.stop - chunk.start)

    def release_full_inputs(self, unit: Unit) -> None:
        """Forget full-precision inputs that are not needed once the unit's targets are known."""
        for name in unit.inputs:
            if name in self._quantized and self._last_reader[name] <= unit.index:
                self._release(self._key(FULL, name))

    def release(self, unit: Unit) -> None:
        """Forget what no unit after `unit` reads, in both streams."""
        for name in (*unit.inputs, *unit.outputs):
            if self._last_reader.get(name, -1) <= unit.index:
                self._release(self._key(FULL, name))
                self._release(self._key(QUANTIZED, name))

    def _release(self, key: str) -> None:
        if key in self.cache:
            self.cache.release(key)

    def _shares(self, stream: str, name: str) -> bool:
        return stream != FULL and name not in self._quantized

    def _key(self, stream: str, name: str) -> str:
        return f"{FULL if name not in self._quantized else stream}:{name}"

    def _write(self, stream: str, name: str, value: Tensor, start: int, count: int) -> None:
        if name not in self._rowwise:
            known = self.constants.setdefault(name, value)
            if known is not value and not torch.equal(known, value):
                raise CalibrationError(f"{name}: differs between samples but has no batch dimension; split the set")
            return
        key = self._key(stream, name)
        if key not in self.cache:
            self.cache.allocate(key, (self.rows, *value.shape[1:]), value)
        store = self.cache[key]
        if store.shape[1:] != value.shape[1:] or value.shape[0] != count:
            raise CalibrationError(
                f"{name}: {tuple(value.shape)} for {count} samples after {tuple(store.shape[1:])} a sample; "
                f"reconstruction wants samples of one shape: calibrate on one resolution and context length"
            )
        store[start : start + count].copy_(value)


def _depends_on_quantizers(graph_module: fx.GraphModule) -> dict[str, None]:
    """Names of the nodes whose value differs between the streams."""
    found: dict[str, None] = {}
    kinds = (ActivationQuantizer, AttentionQuantizer, WeightQuantizer)
    for node in graph_module.graph.nodes:
        quantizes = node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), kinds)
        if quantizes or any(item.name in found for item in node.all_input_nodes):
            found[node.name] = None
    return found


def _rowwise(graph_module: fx.GraphModule) -> dict[str, None]:
    """Names of the tensors whose first dimension is the batch, or might be: its size is symbolic."""
    found: dict[str, None] = {}
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.ndim and isinstance(value.shape[0], torch.SymInt):
            found[node.name] = None
    return found
