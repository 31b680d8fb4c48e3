"""A file a finished block: a killed run continues behind the last one and ends bit-equal."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qdiff_fx.errors import CheckpointError
from qdiff_fx.fake_quantize import ActivationQuantizer
from qdiff_fx.numerics.affine import QParams
from qdiff_fx.reconstruction.result import BlockResult
from qdiff_fx.reconstruction.subgraph import Unit
from qdiff_fx.safe_io import json_field, read_json, read_tensors, remove_partial_files, write_json, write_tensors

logger = logging.getLogger(__name__)

_IDENTITY = "identity.json"
_GRID = {
    "weight_scale": "scale",
    "weight_zero_point": "zero_point",
    "weight_factor": "channel_factor",
    "weight_shift": "channel_shift",
}
"""Tensors of a weight quantizer by their names in a block's file."""


class BlockCheckpoint:
    """The finished blocks in a folder.

    Args:
      folder: made if needed; None keeps nothing.
      identity: digests by what they are of ("model", "calibration set", ...).

    Raises:
      CheckpointError: if the folder holds another identity; the message says which part differs.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, str]) -> None:
        self.folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial_files(folder)
        path = folder / _IDENTITY
        if path.exists():
            found = read_json(path)
            differing = [part for part in dict.fromkeys((*identity, *found)) if found.get(part) != identity.get(part)]
            if differing:
                raise CheckpointError(
                    f"{folder}: holds a reconstruction with another {' and another '.join(differing)}; "
                    f"use another checkpoint_dir, or delete it"
                )
        else:
            write_json(path, dict(identity))

    def save(self, unit: Unit, result: BlockResult) -> None:
        """Keep what the unit learned. The tensors are written first: a result without them never exists."""
        if self.folder is None:
            return
        tensors: dict[str, Tensor] = {}
        if result.phase == "weights":
            for place, item in enumerate(unit.weights):
                if item.owned and item.quantizer.round_up is not None:
                    tensors[f"round_up.{place}"] = item.quantizer.round_up
            tensors |= _grids(unit)
        else:
            for place, quantizer in enumerate(unit.quantizers):
                tensors[f"scale.{place}"] = quantizer.scale
        stem = self._stem(unit, result.phase)
        digest = write_tensors(self.folder / f"{stem}.safetensors", tensors)
        write_json(self.folder / f"{stem}.json", {"result": result.to_dict(), "sha256": digest})

    def restore(self, unit: Unit, phase: str) -> BlockResult | None:
        """Write what was learned into the unit's quantizers; None if the block is not finished or damaged."""
        if self.folder is None or not (self.folder / f"{self._stem(unit, phase)}.json").exists():
            return None
        path = self.folder / f"{self._stem(unit, phase)}.json"
        try:
            entry = read_json(path)
            tensors = read_tensors(path.with_suffix(".safetensors"), json_field(entry, "sha256", str, path))
            result = BlockResult(**json_field(entry, "result", dict, path))
        except (CheckpointError, TypeError) as error:
            logger.warning("%s; the block is reconstructed again", error)
            return None
        if phase == "weights" and not _same(tensors, _grids(unit)):
            logger.warning("%s: its rounding is that of other weight grids; the block is reconstructed again", path)
            return None
        for name, tensor in tensors.items():
            kind, place = name.split(".")
            if kind == "round_up":
                weight = unit.weights[int(place)]
                weight.quantizer.round_up = tensor.to(torch.bool).to(weight.weight.device)
            elif kind == "scale":
                _set_scale(unit.quantizers[int(place)], tensor)
        return result

    @staticmethod
    def _stem(unit: Unit, phase: str) -> str:
        return f"{phase}-{unit.index:04d}"


def _grids(unit: Unit) -> dict[str, Tensor]:
    """What the codes of the unit's weights are rounded on, channel factors and shifts with it."""
    named = {
        f"{name}.{place}": getattr(item.quantizer, attribute)
        for place, item in enumerate(unit.weights)
        if item.owned
        for name, attribute in _GRID.items()
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _same(stored: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> bool:
    grids = {name: tensor for name, tensor in stored.items() if name.partition(".")[0] in _GRID}
    return grids.keys() == present.keys() and all(
        torch.equal(tensor, present[name].to(tensor.device)) for name, tensor in grids.items()
    )


def _set_scale(quantizer: ActivationQuantizer, scale: Tensor) -> None:
    quantizer.set_qparams(QParams(scale, quantizer.zero_point))
