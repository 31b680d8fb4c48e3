"""Run a prepared model over calibration data and fix every quantizer's grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.calibration.dataset import CalibrationSet
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.errors import CalibrationError, CheckpointError
from qdiff_fx.fake_quantize import ActivationQuantizer, WeightQuantizer
from qdiff_fx.graph.edit import get_tensor
from qdiff_fx.graph.meta import LAYER
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.safe_io import read_json, read_tensors, write_json, write_tensors

logger = logging.getLogger(__name__)

SAVE_EVERY = 16
"""Batches between two saves of the observation."""

_STATE, _POSITION = "observation.safetensors", "observation.json"


def observe(
    call: Callable[..., Any],
    graph_module: fx.GraphModule,
    data: CalibrationSet,
    *,
    batch_size: int,
    seed: int,
    identity: str,
    checkpoint_dir: Path | None,
    progress: bool | None,
) -> None:
    """Make `call` with all of `data` while the quantizers of `graph_module` observe.

    With a checkpoint directory the observers' state is saved as it grows, and a later call continues from there.

    Args:
      call: of the prepared model, in observing mode.
      identity: of model, config and data; a checkpoint of another is refused.
    """
    observers = dict(activation_quantizers(graph_module))
    done = 0
    if checkpoint_dir is not None:
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        done = _restore(checkpoint_dir, observers, identity)
    batches = -(-len(data) // batch_size)
    with torch.no_grad(), progress_bar("observe", total=None, progress=progress) as bar:
        for index, batch in enumerate(data.batches(batch_size, seed=seed)):
            bar.total = max(batches, index + 1)
            if index >= done:
                call(*batch.args, **batch.kwargs)
                if checkpoint_dir is not None and (index + 1) % SAVE_EVERY == 0:
                    _save(checkpoint_dir, observers, identity, index + 1)
            bar.update(1)
        if checkpoint_dir is not None:
            _save(checkpoint_dir, observers, identity, index + 1)


def reset(graph_module: fx.GraphModule) -> None:
    """Bring every quantizer back to where `prepare` left it, so that grids come from what is observed next alone."""
    for _, activation in activation_quantizers(graph_module):
        activation.reset()
    for weight, _ in weight_quantizers(graph_module):
        weight.reset()


def fit_activations(graph_module: fx.GraphModule) -> None:
    """Fix every activation quantizer's grid from what it observed, in execution order.

    Raises: CalibrationError naming the first quantizer that observed nothing.
    """
    for quantizer in dict(activation_quantizers(graph_module)).values():
        if not quantizer.calibrated:
            quantizer.fit()


def fit_weights(graph_module: fx.GraphModule, *, progress: bool | None = False) -> None:
    """Fix every weight quantizer's grid from its weight."""
    weights = [item for item in weight_quantizers(graph_module) if not item[0].calibrated]
    with progress_bar("weights", total=len(weights), progress=progress) as bar:
        for quantizer, weight in weights:
            quantizer.fit(weight)
            bar.update(1)


def activation_quantizers(graph_module: fx.GraphModule) -> Iterator[tuple[str, ActivationQuantizer]]:
    """Every activation quantizer in execution order, those inside attentions included."""
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            for path, module in graph_module.get_submodule(str(node.target)).named_modules():
                if isinstance(module, ActivationQuantizer):
                    yield f"{node.target}.{path}".removesuffix("."), module


def weight_quantizers(graph_module: fx.GraphModule) -> Iterator[tuple[WeightQuantizer, Tensor]]:
    """Every weight quantizer with its weight, in execution order of the layers."""
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if isinstance(module, WeightQuantizer):
                source = node.args[0]
                assert isinstance(source, fx.Node)
                yield module, get_tensor(graph_module, source.target)


def observed_maxima(graph_module: fx.GraphModule) -> dict[str, float]:
    """Largest |x| of every tensor that was observed, by the name of its quantizer."""
    return {
        quantizer.name: float(quantizer.statistics.channel_maxima.max())
        for _, quantizer in activation_quantizers(graph_module)
        if quantizer.statistics.channel_maxima.numel()
    }


def observed_offsets(graph_module: fx.GraphModule) -> dict[str, float]:
    """`offset_ratio` of every tensor with positions that was observed, by the name of its quantizer."""
    ratios = {quantizer.name: quantizer.statistics.offset_ratio for _, quantizer in activation_quantizers(graph_module)}
    return {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}


def check_data(data: CalibrationSet, signature: CallSignature, model_config: dict[str, Any]) -> None:
    """Raise CalibrationError unless `data` are calls of a model with this signature and config."""
    if len(data) == 0:
        raise CalibrationError("the calibration set is empty; collect some samples first")
    model = data.metadata.get("model") or {}
    recorded = model.get("config") if isinstance(model, dict) else None
    for key, value in (recorded or {}).items():
        if not key.startswith("_") and key in model_config and _plain(model_config[key]) != _plain(value):
            raise CalibrationError(
                f"the calibration set was collected from another model: {key}={value!r} there, {model_config[key]!r} "
                f"here; collect it from this one"
            )
    call = next(data.batches(1))
    try:
        signature.flatten(call.args, call.kwargs)
    except ValueError as error:
        raise CalibrationError(f"the calibration set does not fit the model: {error}") from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def quantizer_rows(graph_module: fx.GraphModule) -> list[dict[str, Any]]:
    """Grid and ranges of every activation quantizer, as plain JSON types, for reports."""
    rows = []
    for _, quantizer in activation_quantizers(graph_module):
        ranges = quantizer.statistics.ranges()
        rows.append(
            {
                "name": quantizer.name,
                "bits": quantizer.spec.bits,
                "scale": float(quantizer.scale),
                "zero_point": int(quantizer.zero_point),
                "minimum": float(quantizer.observer.minimum),
                "maximum": float(quantizer.observer.maximum),
                "channel_maxima": quantizer.statistics.channel_maxima.tolist(),
                "by_timestep": [[item.timestep, item.minimum, item.maximum] for item in ranges],
            }
        )
    return rows


def layer_rows(graph_module: fx.GraphModule) -> list[dict[str, Any]]:
    """Bits and reason of every layer, in execution order, as plain JSON types."""
    policies = (LAYER.get(node) for node in graph_module.graph.nodes)
    return [
        {
            "name": policy.name,
            "operator": policy.operator,
            "weight_bits": policy.weight.bits if policy.weight else None,
            "activation_bits": policy.activation.bits if policy.activation else None,
            "reason": policy.reason,
        }
        for policy in policies
        if policy is not None
    ]


def _save(folder: Path, observers: dict[str, ActivationQuantizer], identity: str, done: int) -> None:
    tensors = {
        f"{name}.{key}": value
        for name, quantizer in observers.items()
        for key, value in quantizer.state_dict().items()
        if value.numel()
    }
    digest = write_tensors(folder / _STATE, tensors)
    write_json(folder / _POSITION, {"identity": identity, "batches": done, "sha256": digest})


def _restore(folder: Path, observers: dict[str, ActivationQuantizer], identity: str) -> int:
    """Load the saved observation; returns how many batches it covers."""
    if not (folder / _POSITION).exists():
        return 0
    position = read_json(folder / _POSITION)
    if position.get("identity") != identity:
        raise CheckpointError(
            f"{folder}: holds the calibration of another model, config or calibration set; "
            f"use another checkpoint_dir, or delete it"
        )
    try:
        tensors = read_tensors(folder / _STATE, str(position.get("sha256")))
    except CheckpointError:
        # Killed between the two writes: the observation starts over, nothing else is lost.
        logger.warning("%s: the saved observation is incomplete, starting over", folder)
        return 0
    for name, quantizer in observers.items():
        state = quantizer.state_dict()
        prefix = f"{name}."
        state.update({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
        quantizer.load_state_dict(state)
    return int(position["batches"])
