"""Fold per-channel factors into weights and activation steps, where that lowers a layer's output error.

For input channel c a factor m_c > 0: the activation's step becomes s_x * m_c, the weight is quantized as W[:, c] * m_c.
At run time it costs nothing (the quantize step multiplies with a vector instead of a scalar).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from qdiff_fx.allocation.factor_errors import Errors, Reader, layer_output
from qdiff_fx.allocation.factor_search import Found, search_factor
from qdiff_fx.allocation.probe import Probe, flat_inputs, spread_rows
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.config import QDiffConfig
from qdiff_fx.fake_quantize import ActivationQuantizer, QuantizerMode, WeightQuantizer, preserved_modes, set_mode
from qdiff_fx.graph.edit import get_tensor, layer_call
from qdiff_fx.graph.memory import row_memory, rows_within
from qdiff_fx.graph.meta import LAYER
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.prepare.own_quantizers import GiveOwnQuantizers

OWN_STEP_GAIN_DB = 0.5
"""A quantize step of a layer's own costs a pass over the tensor at run time: it must pay."""

_SEARCH_COPIES = 6
"""A layer's input rounded, its outputs, their errors: what the search holds beside the forward pass."""


@dataclass(frozen=True, kw_only=True)
class FactorChoice:
    """What was chosen for one quantized tensor.

    Args:
      layers: the layers that read it.
      exponent: a of the winning factor, None for "off".
      shifted: whether 4-bit weights take part of the factor as shifts.
      gain_db: how much lower the layers' relative output error is than without factors.
      spread, spread_after: the largest channel's maximum over the median channel's, before and after the factor.
      own_step: whether this layer got a quantize step of its own, beside that of the layers that it shared with.
      learned: whether the factor was refined by learning (`QDiffConfig.factor_iterations`).
      reason: why an attention's operands were left alone, "" for others.
    """

    layers: tuple[str, ...]
    exponent: float | None
    shifted: bool
    gain_db: float
    spread: float = 1.0
    spread_after: float = 1.0
    own_step: bool = False
    learned: bool = False
    reason: str = ""


def choose_channel_factors(
    graph_module: fx.GraphModule,
    signature: CallSignature,
    data: CalibrationSet,
    *,
    layers: Collection[str] | None = None,
    shifts: bool = True,
    centred: bool = False,
    iterations: int = 0,
    samples: int = 96,
    seed: int = 0,
    progress: bool | None = False,
) -> tuple[FactorChoice, ...]:
    """Try every candidate on every quantized layer input and keep the best; "off" wins ties.

    Candidates are judged by the relative output error of the layers that read the tensor, with input and weight
    quantized, on `samples` rows evenly over the timesteps (fewer where so many would not fit into memory). Quantizers
    must be fitted; winners are fitted anew. Layers that share a tensor share its factor, but for those whose error
    falls by more than `OWN_STEP_GAIN_DB` with a quantize step of their own.

    Args:
      layers: try tensors that one of these reads and that have no factor yet; None tries all.
      shifts: also try candidates with channel shifts at 4-bit weights.
      centred: judge by what varies of the error: biases will make up for its mean.
      iterations: steps of learning from the best candidate on; what it finds is kept only where it wins.

    Left alone: inputs of layers in the carrier type, weights that several calls share, attention operands.
    """
    readers = {
        str(node.target): found
        for node in input_nodes(graph_module)
        if (found := readers_of(graph_module, node, centred=centred)) and (layers is None or _open(found, layers))
    }
    if not readers:
        return ()
    choices: list[FactorChoice] = []
    alone: list[_Alone] = []

    def on_weight(target: str, quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
        return weight

    with progress_bar("channel factors", total=len(readers), progress=progress) as bar:

        def on_input(target: str, quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
            if target in readers:
                choices.extend(
                    _choose(
                        partial(search_factor, quantizer, x, shifts=shifts, iterations=iterations),
                        quantizer,
                        readers[target],
                        x,
                        alone,
                    )
                )
                bar.update(1)
            return x

        probe = Probe(graph_module, on_weight=on_weight, on_input=on_input)
        device = next((item.weight.device for group in readers.values() for item in group), torch.device("cpu"))
        memory = row_memory(graph_module, flat_inputs(data, torch.tensor([0]), signature, device))
        samples = rows_within(memory.forward + _SEARCH_COPIES * memory.largest, samples)
        inputs = flat_inputs(data, spread_rows(data, samples, seed), signature, device)
        with preserved_modes(graph_module), torch.no_grad():
            set_mode(graph_module, QuantizerMode.PASS)
            probe.run(*inputs)
    own = GiveOwnQuantizers(tuple(item.reader.call.node for item in alone))
    own.run(graph_module, PassContext(config=QDiffConfig(), signature=signature))
    for item in alone:
        item.found.install(own.created[item.reader.call.node], (item.reader,))
    return tuple(choices)


def _open(readers: Sequence[Reader], layers: Collection[str]) -> bool:
    """Whether one of `layers` is among the readers, and their tensor has no factor."""
    free = all(reader.quantizer.channel_factor is None for reader in readers)
    return free and any(LAYER.require(reader.call.node).name in layers for reader in readers)


@dataclass(frozen=True, kw_only=True)
class _Alone:
    """A layer that is better off with a quantize step of its own, and the factor that it takes."""

    reader: Reader
    found: Found


def _choose(
    search: Callable[[Sequence[Reader]], Found],
    quantizer: ActivationQuantizer,
    readers: Sequence[Reader],
    x: Tensor,
    alone: list[_Alone],
) -> Iterator[FactorChoice]:
    """Install the best common factor that `search` finds for a tensor's readers; those that leave go to `alone`."""
    common = search(readers)
    leaving: dict[int, Found] = {}
    if len(readers) > 1:
        for index, reader in enumerate(readers):
            own = search((reader,))
            target = layer_output(reader.call, x, reader.weight)
            shared = Errors.of((reader,), (target,), x, common.rounded, common.fitted[index : index + 1])
            if own.errors.score * 10.0 ** (OWN_STEP_GAIN_DB / 10.0) < shared.score:
                leaving[index] = own
    if len(leaving) == len(readers):
        leaving.pop(0)  # one of them keeps the step that is there
    staying = tuple(reader for index, reader in enumerate(readers) if index not in leaving)
    if leaving:
        common = search(staying)
    for index, found in leaving.items():
        alone.append(_Alone(reader=readers[index], found=found))
        yield _choice(quantizer, (readers[index],), found, own_step=True)
    common.install(quantizer, staying)
    yield _choice(quantizer, staying, common, own_step=False)


def _choice(quantizer: ActivationQuantizer, readers: Sequence[Reader], found: Found, *, own_step: bool) -> FactorChoice:
    candidate, maxima = found.candidate, quantizer.statistics.channel_maxima
    return FactorChoice(
        layers=tuple(LAYER.require(reader.call.node).name for reader in readers),
        exponent=None if candidate is None else candidate.exponent,
        shifted=candidate is not None and candidate.shift is not None,
        learned=candidate is not None and candidate.learned,
        gain_db=found.gain_db,
        spread=_spread(maxima),
        spread_after=_spread(maxima if candidate is None else maxima.to(candidate.factor.device) / candidate.factor),
        own_step=own_step,
    )


def _spread(maxima: Tensor) -> float:
    """The largest channel's maximum over that of the median channel that is not silent."""
    heard = maxima[maxima > 0]
    return float(heard.max() / heard.median()) if heard.numel() else 1.0


def input_nodes(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """The calls of activation quantizers, in execution order."""
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), ActivationQuantizer):
            yield node


def readers_of(graph_module: fx.GraphModule, node: fx.Node, *, centred: bool = False) -> tuple[Reader, ...]:
    """The layers behind an input quantizer; none if one of them cannot take a factor. `centred` is `Reader`'s."""
    readers = []
    for user in node.users:
        call = layer_call(user)
        if call is None or call.weight.op != "call_module" or len(call.weight.users) != 1:
            return ()
        quantizer = graph_module.get_submodule(str(call.weight.target))
        if not isinstance(quantizer, WeightQuantizer):
            return ()
        weight = get_tensor(graph_module, call.weight_source.target)
        readers.append(Reader(call=call, weight=weight, quantizer=quantizer, centred=centred))
    return tuple(readers)
