"""From the backend-neutral plan to one backend's kernels, and the report of what runs where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.autotune import TUNERS, Timings, choose
from qdiff_fx.calibration.progress import named_steps
from qdiff_fx.config import QDiffConfig
from qdiff_fx.errors import InputError
from qdiff_fx.graph.edit import LAYER_OPERATORS, delete_tensor, get_tensor, shared_copy, stored_bytes
from qdiff_fx.graph.meta import (
    ATTENTION,
    FALLBACK,
    KERNEL,
    LAYER,
    MERGED,
    MODULE_PATH,
    PARTS,
    STORED,
    TIMED,
    LayerTiming,
    StoredWeight,
)
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.passes.base import GraphPass, PassContext, run_passes
from qdiff_fx.passes.lower import LOWER
from qdiff_fx.passes.lower.merged_linears import MergeStoredLinears
from qdiff_fx.passes.lower.shared_steps import ShareQuantizeSteps

aten = torch.ops.aten
qdiff = torch.ops.qdiff

_LAYERS = (qdiff.conv2d.default, qdiff.linear.default, *LAYER_OPERATORS)
_BEFORE_TIMING: Mapping[str, tuple[GraphPass, ...]] = {
    "x86": (ShareQuantizeSteps(),),
    "cuda": (ShareQuantizeSteps(), MergeStoredLinears()),
}
"""Passes that a backend's timed layers stand behind."""

_ATTENTIONS = (
    "qdiff.attention.default",
    "qdiff.cuda_attention.default",
    "qdiff.vnni_attention.default",
    "aten.scaled_dot_product_attention.default",
)
"""By name: not every operator is registered on every machine."""


@dataclass(frozen=True, kw_only=True)
class LoweringRow:
    """One node of the lowered graph.

    Args:
      node: its name in the graph.
      layer: the layer's name, the module path for others.
      kernel: what runs.
      dtype: of the weight codes ("int4", "int8") or of the carrier.
      bytes: of its constants as stored in the plan.
      fallback: why it does not run on integers, "" if it does or was asked not to.
      simulated: whether it computes the plan's quantized values all the same, in floating point; strict=True allows
        these fallbacks and no others.
      reason: why its widths are not the config's (allocation, a target, a rule, the network's boundary), "" if they
        are.
      timing: of both kernels, None unless one was chosen by timing.
    """

    node: str
    layer: str
    kernel: str
    dtype: str
    bytes: int
    fallback: str
    simulated: bool = False
    reason: str = ""
    timing: LayerTiming | None = None

    @property
    def times(self) -> tuple[str, ...]:
        """Microseconds on integers and in the carrier type, "" where none were taken."""
        timing = self.timing
        return ("", "") if timing is None else (f"{timing.integer:.0f}", f"{timing.carrier:.0f}")


@dataclass(frozen=True, kw_only=True)
class LoweringReport:
    """What every layer and attention runs on.

    Args:
      backend: its name.
      rows: in execution order.
      extra_quantize_steps: quantize steps beyond one a tensor, for layers that are better off with their own.
      timings: of this machine, with those taken for this report; {} unless kernels were chosen by timing.
      steps: milliseconds that one call of calibration's sizes took on each backend; {} unless it was chosen by that.
      refused: backends that could not be timed against the others, and why.
    """

    backend: str
    rows: tuple[LoweringRow, ...]
    extra_quantize_steps: int = 0
    timings: Timings = field(default_factory=dict)
    steps: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        timed = any(row.timing for row in self.rows)
        why = any(row.reason for row in self.rows)
        header = ("layer", "kernel", "dtype", "bytes", *(("int8 us", "carrier us") if timed else ()), "fallback")
        header += ("why these widths",) if why else ()
        lines = [header]
        for row in self.rows:
            times = row.times if timed else ()
            widths_by = (row.reason,) if why else ()
            lines.append((row.layer, row.kernel, row.dtype, f"{row.bytes:,}", *times, row.fallback, *widths_by))
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        table.insert(1, "  ".join("-" * width for width in widths))
        summary = f"backend {self.backend}: {len(self.rows)} nodes, {self.total_bytes:,} bytes"
        if extra := self.extra_quantize_steps:
            what = "1 tensor is" if extra == 1 else f"{extra} tensors are"
            summary += f"; {what} quantized more than once, for layers with factors of their own"
        if self.steps:
            took = ", ".join(f"{name} {value:.4g} ms" for name, value in self.steps.items())
            summary += f"; taken for the fastest step: {took}"
        for name, reason in self.refused.items():
            summary += f"; not {name}: {reason}"
        return "\n".join([*table, summary])


def check_choices(*, strict: bool, autotune: bool) -> None:
    """Raise InputError for settings that contradict each other."""
    if strict and autotune:
        raise InputError("strict=True keeps every layer on integers, autotune=True may not; want one of them")


def lower(
    plan: fx.GraphModule,
    backend: str,
    signature: CallSignature,
    *,
    strict: bool = False,
    separate: bool = False,
    timings: Timings | None = None,
    progress: bool | None = False,
) -> tuple[fx.GraphModule, LoweringReport]:
    """The plan rewritten to `backend`'s kernels, sharing its tensors, and what runs where.

    Args:
      strict, separate: see `PassContext`.
      timings: choose between kernels, and between integers and the carrier type, by these, taking those that are
        missing; None times nothing: x86 runs every integer layer on integers, cuda goes by its performance model.
      progress: show a bar; None does so on a terminal.
    """
    lowered = shared_copy(plan)
    reported = [node for node in lowered.graph.nodes if node.target in _LAYERS]
    for node in reported:
        STORED.set(node, _stored(lowered, node))
    context = PassContext(config=QDiffConfig(), signature=signature, strict=strict, separate=separate)
    if timings is not None and backend in TUNERS:
        run_passes(_BEFORE_TIMING.get(backend, ()), lowered, context)
        choices = choose(TUNERS[backend](lowered), timings, progress=progress)
        context.carrier_layers, context.kernels, timings = choices.carrier, choices.kernels, choices.timings
    with named_steps(f"lower to {backend}", total=len(LOWER[backend]), progress=progress) as begin:
        run_passes(LOWER[backend], lowered, context, begin)
    _drop_unread(lowered)
    return lowered, LoweringReport(
        backend=backend,
        rows=tuple(_rows(lowered)),
        extra_quantize_steps=_extra_quantize_steps(plan),
        timings=timings or {},
    )


def _drop_unread(lowered: fx.GraphModule) -> None:
    """Take out tensors that no node reads: what the plan alone reads, and constants that one pass made for another."""
    read = {str(node.target) for node in lowered.graph.nodes if node.op == "get_attr"}
    held = (lowered.named_parameters(remove_duplicate=False), lowered.named_buffers(remove_duplicate=False))
    for name in [name for tensors in held for name, _ in tensors if name not in read]:
        delete_tensor(lowered, name)


def offload(plan: fx.GraphModule, lowered: fx.GraphModule, move: Callable[[Tensor], Tensor] = Tensor.cpu) -> None:
    """Move, in place, what only the plan still holds: packed weights that kernels read in another layout."""
    read = (get_tensor(lowered, node.target) for node in lowered.graph.nodes if node.op == "get_attr")
    used = {tensor.untyped_storage().data_ptr() for tensor in read}
    for tensor in (*plan.parameters(), *plan.buffers()):
        if tensor.untyped_storage().data_ptr() not in used:
            tensor.data = move(tensor.data)


def _extra_quantize_steps(plan: fx.GraphModule) -> int:
    sources = [node.args[0] for node in plan.graph.nodes if node.target is qdiff.quantize.default]
    return len(sources) - len(dict.fromkeys(sources))


def _stored(graph_module: fx.GraphModule, node: fx.Node) -> StoredWeight:
    """What the plan holds for a layer."""
    sources = [item for item in node.all_input_nodes if item.op == "get_attr"]
    for item in node.all_input_nodes:
        if item.target is qdiff.dequantize_weight.default:
            sources += [source for source in item.all_input_nodes if source.op == "get_attr"]
    tensors = [get_tensor(graph_module, item.target) for item in sources]
    dtypes = [tensor.dtype for tensor in tensors]
    value: Any = node.meta["val"]
    codes = "int4" if torch.uint8 in dtypes else "int8" if torch.int8 in dtypes else None
    return StoredWeight(dtype=codes or str(value.dtype).removeprefix("torch."), bytes=stored_bytes(tensors))


def _rows(graph_module: fx.GraphModule) -> Iterator[LoweringRow]:
    for node in (part for call in graph_module.graph.nodes for part in PARTS.get(call) or (call,)):
        stored = STORED.get(node)
        if stored is None and str(node.target) not in _ATTENTIONS:
            continue
        policy, attention = LAYER.get(node), ATTENTION.get(node)
        name = policy.name if policy else attention.name if attention else MODULE_PATH.get(node) or node.name
        simulated = node.target is qdiff.attention.default
        value: Any = node.meta["val"]
        call: Any = node.args[0] if MERGED.get(node) else node
        kernel = KERNEL.get(call) or str(call.target).removesuffix(".default")
        if call.target in LAYER_OPERATORS and stored is not None and stored.dtype.startswith("int"):
            kernel += " on dequantized weight" if not _reads_codes(call) else " on dequantized codes"
        if count := MERGED.get(node):
            kernel += f", one of {count} merged"
        yield LoweringRow(
            node=node.name,
            layer=name,
            kernel=kernel,
            dtype=stored.dtype if stored else str(value.dtype).removeprefix("torch."),
            bytes=stored.bytes if stored else 0,
            fallback="simulated: quantized operands, products in the carrier type"
            if simulated
            else FALLBACK.get(call) or "",
            simulated=simulated,
            reason=policy.reason if policy and policy.reason != "config" else "",
            timing=TIMED.get(call),
        )


def _reads_codes(node: fx.Node) -> bool:
    """Whether a layer of the quantize/dequantize form has integer input codes."""
    source = node.args[0]
    return isinstance(source, fx.Node) and str(source.target).startswith("quantized_decomposed.dequantize")
