"""The arms of the method table: how each network is made, once, and kept in the work folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qdiff_fx
from provenance import slug
from qdiff_fx.allocation.units import multiplications
from qdiff_fx.cli.sources import Source
from qdiff_fx.evaluation.arms import ARMS as SIMPLER
from qdiff_fx.graph.edit import layer_call
from qdiff_fx.graph.meta import LAYER
from qdiff_fx.report.documents import stored_bytes
from qdiff_fx.safe_io import read_json, write_json

FULL_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the method table.

    Args:
      preset: of QDiffConfig; None is full precision.
      config: fields of QDiffConfig beyond the preset.
      learn: fields of ReconstructionConfig beyond preset "fast"; None rounds to nearest.
    """

    preset: str | None
    config: Mapping[str, Any] = field(default_factory=dict)
    learn: Mapping[str, Any] | None = None


_PLAIN: Mapping[str, Any] = {"weight_slack": 0.0, "activation_slack": 0.0, "equalize": False, "bias_correction": False}
_LINEAR = _PLAIN | SIMPLER[0].changes

ARMS: Mapping[str, Arm] = {
    "full precision": Arm(preset=None),
    "linear RTN W8A8": Arm(preset="w8a8", config=_LINEAR),
    "linear RTN W4A8": Arm(preset="w4a8", config=_LINEAR),
    "SQuant W4A8": Arm(preset="w4a8", config=_PLAIN, learn={"rounding": "squant", "activation_iterations": 0}),
    "ours W8A32": Arm(preset="w8a32", learn={}),
    "ours W4A32": Arm(preset="w4a32", learn={}),
    "ours W8A8": Arm(preset="w8a8", learn={}),
    "ours W4A8": Arm(preset="w4a8", learn={}),
    "ours W4A4": Arm(preset="w4a4", learn={}),
    "ours W8A8, nothing learned": Arm(preset="w8a8"),
    "ours W4A8, nothing learned": Arm(preset="w4a8"),
}
"""By the name in tables. "Linear" as published: min-max ranges, no split, boundaries quantized."""


def make(name: str, source: Source, data: qdiff_fx.CalibrationSet, work: Path) -> Path:
    """The folder of the arm's integer model, made if it is not there: plan, weights and facts.json."""
    arm, folder = ARMS[name], work / "models" / f"{slug(source.name)}-{slug(name)}"
    if (folder / "facts.json").is_file():
        return folder
    assert arm.preset is not None, "full precision is not made"
    started = time.monotonic()
    prepared = qdiff_fx.prepare(source.unet, qdiff_fx.QDiffConfig.preset(arm.preset, **arm.config))
    learning = None if arm.learn is None else qdiff_fx.ReconstructionConfig.preset("fast", **arm.learn)
    qdiff_fx.calibrate(
        prepared, data, reconstruction=learning, checkpoint_dir=work / "blocks" / folder.name, progress=False
    )
    quantized = qdiff_fx.convert(prepared)
    qdiff_fx.save(quantized, folder)
    facts = {
        "seconds": time.monotonic() - started,
        "bytes": stored_bytes(folder),
        "gbops": bit_operations(prepared) / 1e9,
        "calibration_rows": len(data),
    }
    write_json(folder / "facts.json", facts)
    return folder


def facts(name: str, source: Source, work: Path) -> dict[str, Any]:
    """Bytes and bit operations of an arm that was made."""
    if ARMS[name].preset is None:
        parameters = sum(parameter.numel() for parameter in source.unet.parameters())
        prepared = qdiff_fx.prepare(source.unet, qdiff_fx.QDiffConfig.preset("w8a8"))
        return {"bytes": 4 * parameters, "gbops": bit_operations(prepared, full_precision=True) / 1e9, "seconds": 0.0}
    return read_json(work / "models" / f"{slug(source.name)}-{slug(name)}" / "facts.json")


def bit_operations(prepared: qdiff_fx.PreparedUNet, *, full_precision: bool = False) -> int:
    """Multiplications of convs and linears for one sample and step, each times weight bits times input bits.

    The measure of the quantization literature (BOPs); attention products are left out, as there.
    """
    total = 0
    for node in prepared.graph_module.graph.nodes:
        call, policy = layer_call(node), LAYER.get(node)
        if call is None or policy is None:
            continue
        weight = FULL_BITS if policy.weight is None else _bits(prepared, call.weight)
        activation = FULL_BITS if policy.activation is None else _bits(prepared, call.input)
        total += multiplications(call) * (FULL_BITS**2 if full_precision else weight * activation)
    return total


def _bits(prepared: qdiff_fx.PreparedUNet, node: Any) -> int:
    """Of the quantizer that `node` calls; the carrier type's where there is none."""
    if node.op != "call_module":
        return FULL_BITS
    quantizer = prepared.graph_module.get_submodule(str(node.target))
    spec = getattr(quantizer, "spec", None)
    return FULL_BITS if spec is None else int(spec.bits)
