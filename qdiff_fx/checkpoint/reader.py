"""Read a stored model without trusting it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff_fx.calibration.progress import named_steps
from qdiff_fx.checkpoint.model import StoredModel
from qdiff_fx.checkpoint.plan import TensorEntry, decode_entries, decode_model, open_plan
from qdiff_fx.checkpoint.writer import PLAN_FILE, SHARD_NAME
from qdiff_fx.errors import CheckpointError
from qdiff_fx.graph.record import Record, refuse
from qdiff_fx.safe_io import TensorFile, check_digest, digest_field, path_inside, read_json


def read_model(folder: Path, device: torch.device, *, progress: bool | None = False) -> StoredModel:
    """The model in `folder`, on `device`. Integer weights on the CPU stay mapped to the file, they are not copied.

    Args:
      progress: show a bar; None does so on a terminal.

    Raises: CheckpointError naming the file and the field for whatever is missing, damaged, of another version, or not
      as `write_model` writes it.
    """
    path = path_inside(folder, PLAN_FILE)
    if not path.is_file():
        raise CheckpointError(f"{folder}: holds no {PLAN_FILE}; want a folder that qdiff_fx.save wrote")
    record = Record(open_plan(read_json(path), str(path)), str(path))
    shards = list(record.items("shards"))
    with named_steps("load", total=len(shards) + 2, progress=progress) as begin:
        files = []
        for index, (place, value) in enumerate(shards, start=1):
            begin(f"file {index} of {len(shards)}")
            files.append(_open_shard(folder, place, value))
        begin("tensors")
        tensors: dict[str, Tensor] = {}
        entries = decode_entries(record, len(files))
        for name, entry in entries.items():
            tensors[name] = _tensor(files[entry.shard], name, entry, device)
        for index, file in enumerate(files):
            extra = file.names - {name for name, entry in entries.items() if entry.shard == index}
            if extra:
                refuse(str(file.path), f"tensor {min(extra)!r:.60} is not in {PLAN_FILE}")
        begin("graph")
        return decode_model(record, tensors, device)


def _open_shard(folder: Path, place: str, value: Any) -> TensorFile:
    shard = Record(value, place)
    name, digest = shard.text("name"), digest_field(value, "sha256", place)
    shard.raw("sha256")
    if not SHARD_NAME.fullmatch(name):
        refuse(place, f"name {name!r:.80}, want one like model-0123456789abcdef.safetensors")
    path = path_inside(folder, name)
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; copy it beside {PLAN_FILE}, or save the model again")
    size = shard.integer("bytes", 0, 2**62)
    if path.stat().st_size != size:
        refuse(str(path), f"{path.stat().st_size} bytes, want {size}")
    shard.finish()
    check_digest(path, digest)
    return TensorFile(path)


def _tensor(file: TensorFile, name: str, entry: TensorEntry, device: torch.device) -> Tensor:
    tensor = file.tensor(name)
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        refuse(
            str(file.path),
            f"tensor {name} is {tensor.dtype} {list(tensor.shape)}, want {entry.dtype} {list(entry.shape)}",
        )
    if device.type != "cpu":
        tensor = tensor.to(device)
    elif tensor.is_floating_point():
        # Sums of floats may depend on alignment, which a mapped file does not give; integers are exact anywhere.
        tensor = tensor.clone()
    return nn.Parameter(tensor, requires_grad=False) if entry.parameter else tensor
