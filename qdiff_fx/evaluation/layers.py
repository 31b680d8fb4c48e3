"""Where in the network the error sits: SQNR of the output of every layer, attention and block, all quantized."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sized
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.errors import InputError, NonFiniteError
from qdiff_fx.evaluation.inference import evaluating
from qdiff_fx.evaluation.quality import HeldoutBatch
from qdiff_fx.fake_quantize import QuantizerMode, preserved_modes
from qdiff_fx.graph.meta import ATTENTION, BLOCK, LAYER
from qdiff_fx.lowering import lower
from qdiff_fx.model import PreparedUNet, QuantizedUNet
from qdiff_fx.passes.analysis import blocks

Kind = Literal["layer", "attention", "block"]


@dataclass(frozen=True, kw_only=True)
class PartSqnr:
    """How far one part's output is from full precision, its input already carrying the errors of what runs before.

    Args:
      kind: "layer", "attention" or "block" (a reconstruction block: its last result).
      name: of the layer or attention; of a block its index and module path.
      sqnr_db: all signal energy against all noise energy; None where the outputs are equal.
    """

    kind: Kind
    name: str
    sqnr_db: float | None


@dataclass(frozen=True, kw_only=True)
class PartsReport:
    """Every part, in execution order by kind.

    Args:
      parts: layers and attentions as they run, then blocks.
      rows: held-out rows that it was measured on.
    """

    parts: tuple[PartSqnr, ...]
    rows: int

    def worst(self, kind: Kind | None = None, count: int = 10) -> tuple[PartSqnr, ...]:
        """The `count` lowest of one kind, the lowest first."""
        of_kind = (part for part in self.parts if kind is None or part.kind == kind)
        return tuple(sorted(of_kind, key=lambda part: math.inf if part.sqnr_db is None else part.sqnr_db)[:count])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@torch.no_grad()
def parts_sqnr(
    reference: PreparedUNet,
    quantized: PreparedUNet | QuantizedUNet,
    batches: Iterable[HeldoutBatch],
    *,
    progress: bool | None = None,
) -> PartsReport:
    """SQNR of every part of `quantized` against `reference`, both run on the same held-out inputs.

    Args:
      reference: a prepared model of the same network and structural options; its full-precision results are taken.
        It may be `quantized` itself.
      quantized: a calibrated PreparedUNet (simulated) or a QuantizedUNet (its integers).
      batches: recorded calls.
      progress: show a bar, with an ETA where the number of batches is known; None does so on a terminal.

    Raises:
      InputError: without batches, or if the two have no part in common.
      NonFiniteError: if a part's output holds NaN or infinity; names it.
    """
    energies: dict[tuple[Kind, str], list[float]] = {}
    subject, ends = _graph(quantized), _block_ends(reference.graph_module)
    rows = 0
    total = len(batches) if isinstance(batches, Sized) else None
    with evaluating(reference, quantized), progress_bar("parts", total=total, progress=progress) as bar:
        for batch in batches:
            inputs = reference.signature.flatten(batch.args, batch.kwargs)
            with preserved_modes(reference.graph_module):
                reference.set_mode(QuantizerMode.PASS)
                exact = _outputs(reference.graph_module, inputs, ends)
            if isinstance(quantized, PreparedUNet):
                with preserved_modes(quantized.graph_module):
                    quantized.set_mode(QuantizerMode.QUANTIZE)
                    seen = _outputs(subject, inputs, ends)
            else:
                seen = _outputs(subject, inputs, ends)
            rows += len(inputs[0])
            for key in exact.keys() & seen.keys():
                if exact[key].shape == seen[key].shape:
                    sums = energies.setdefault(key, [0.0, 0.0])
                    wide = exact[key].double()
                    sums[0] += float(wide.square().sum())
                    sums[1] += float((seen[key].double() - wide).square().sum())
            bar.update(1)
    if not energies:
        raise InputError(
            "no part to compare: want held-out batches, and a reference prepared from the same network with the "
            "same structural options (prepare(unet, quantized.qdiff_config))"
        )
    ordered = [key for key in exact if key in energies]
    return PartsReport(parts=tuple(_part(key, energies[key]) for key in ordered), rows=rows)


def _part(key: tuple[Kind, str], sums: list[float]) -> PartSqnr:
    signal, noise = sums
    if not math.isfinite(noise) or not math.isfinite(signal):
        raise NonFiniteError(f"the output of {key[0]} {key[1]} holds NaN or infinity: want finite")
    ratio = None if noise == 0.0 else 10.0 * math.log10(max(signal, 1e-300) / noise)
    return PartSqnr(kind=key[0], name=key[1], sqnr_db=ratio)


def _graph(model: PreparedUNet | QuantizedUNet) -> fx.GraphModule:
    """A graph with every layer's result in it: the simulation, or the plan lowered without fused steps."""
    if isinstance(model, PreparedUNet):
        return model.graph_module
    graph_module, _ = lower(copy.deepcopy(model.plan), model.backend, model.signature, separate=True)
    return graph_module


def _block_ends(graph_module: fx.GraphModule) -> dict[str, fx.Node]:
    """By index and module path of every block: the last node that makes its result."""
    names = {block.index: f"{block.index} {block.name}" for block in blocks(graph_module)}
    ends: dict[str, fx.Node] = {}
    for node in graph_module.graph.nodes:
        block, value = BLOCK.get(node), node.meta.get("val")
        # A quantizer's result is the next block's input on its grid, not what this block made.
        makes = node.op == "call_function" or ATTENTION.get(node) is not None
        if block in names and makes and isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            ends[names[block]] = node
    return ends


def _outputs(
    graph_module: fx.GraphModule, inputs: tuple[Tensor, ...], ends: Mapping[str, fx.Node]
) -> dict[tuple[Kind, str], Tensor]:
    recorder = _Recorder(graph_module, ends)
    recorder.run(*inputs)
    return recorder.results()


class _Recorder(fx.Interpreter):
    """Keeps the results of layers, attentions, and of the blocks that end in `ends`, nodes of the reference's graph.

    Conversion replaces layers and attentions, which are found again by their policies, and keeps the names of all other
    nodes. A block whose last node was fused away has no result.
    """

    def __init__(self, graph_module: fx.GraphModule, ends: Mapping[str, fx.Node]) -> None:
        super().__init__(graph_module)
        self._ends = ends
        self._wanted = {node.name for node in ends.values()}
        self._parts: dict[tuple[Kind, str], Tensor] = {}
        self._by_node: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        layer, attention = LAYER.get(n), ATTENTION.get(n)
        if layer is not None:
            self._parts["layer", layer.name] = result
        elif attention is not None:
            self._parts["attention", attention.name] = result
        elif n.name in self._wanted:
            self._by_node[n.name] = result
        return result

    def results(self) -> dict[tuple[Kind, str], Tensor]:
        """Layers and attentions in execution order, then blocks."""
        found: dict[tuple[Kind, str], Tensor | None] = dict(self._parts)
        for name, node in self._ends.items():
            layer, attention = LAYER.get(node), ATTENTION.get(node)
            if layer is not None:
                found["block", name] = self._parts.get(("layer", layer.name))
            elif attention is not None:
                found["block", name] = self._parts.get(("attention", attention.name))
            else:
                found["block", name] = self._by_node.get(node.name)
        return {key: value for key, value in found.items() if value is not None}
