"""Write a stored model so that a folder always holds a whole one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff_fx.calibration.progress import named_steps
from qdiff_fx.checkpoint.model import StoredModel
from qdiff_fx.checkpoint.plan import TensorEntry, complete_plan, encode_plan, seal_plan
from qdiff_fx.errors import CheckpointError
from qdiff_fx.graph.edit import get_tensor
from qdiff_fx.graph.serialize import check_tensor_name
from qdiff_fx.safe_io import remove_partial_files, write_bytes, write_tensors

PLAN_FILE = "plan.json"
SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?-[0-9a-f]{16}\.safetensors")
DEFAULT_SHARD_BYTES = 5 * 10**9


def write_model(
    model: StoredModel,
    folder: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool | None = False,
) -> None:
    """Make `model` the one that `folder` holds.

    Shards carry a content hash in their names and never replace each other; the plan names its shards and is put in
    place last, by one rename. A kill at any point leaves the old model or the new one; what it left over is deleted by
    the next save.

    Args:
      max_shard_bytes: a new shard begins where one would grow past this; a tensor is never divided.
      progress: show a bar; None does so on a terminal.

    Raises: CheckpointError if the graph cannot be stored (before anything is written) or the disk is full.
    """
    if max_shard_bytes <= 0:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes}: want a positive number of bytes")
    where = str(folder / PLAN_FILE)
    tensors = _tensors(model, where)
    groups = _groups(tensors, max_shard_bytes)
    entries = {
        name: TensorEntry(
            dtype=tensor.dtype, shape=tuple(tensor.shape), parameter=isinstance(tensor, nn.Parameter), shard=index
        )
        for index, group in enumerate(groups)
        for name, tensor in group.items()
    }
    with named_steps("save", total=len(groups) + 2, progress=progress) as begin:
        begin("plan")
        plan = encode_plan(model, entries, _library_version(), where)
        begin("check")
        complete_plan(plan, tensors, next((tensor.device for tensor in tensors.values()), torch.device("cpu")), where)
        _make_folder(folder)
        remove_partial_files(folder)
        plan["shards"] = []
        for index, group in enumerate(groups):
            begin(f"file {index + 1} of {len(groups)}")
            plan["shards"].append(_write_shard(folder, group, index, len(groups)))
    write_bytes(folder / PLAN_FILE, seal_plan(plan))
    wanted = {shard["name"] for shard in plan["shards"]}
    for path in folder.iterdir():
        if SHARD_NAME.fullmatch(path.name) and path.name not in wanted:
            path.unlink(missing_ok=True)


def _library_version() -> str:
    try:
        return version("qdiff-fx")
    except PackageNotFoundError:  # a source tree that is not installed
        return "unknown"


def _tensors(model: StoredModel, where: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for node in model.plan.graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            check_tensor_name(name, where)
            tensors[name] = get_tensor(model.plan, name)
    return dict(sorted(tensors.items()))


def _groups(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        count = tensor.numel() * tensor.element_size()
        if groups[-1] and size + count > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += count
    return groups


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made ({error.strerror or error}); choose another folder") from error


def _write_shard(folder: Path, tensors: Mapping[str, Tensor], index: int, count: int) -> dict[str, Any]:
    """Write one shard under a temporary name, then under the name that its content gives it."""
    unplaced = folder / f".shard-{index + 1:05d}.partial"
    digest = write_tensors(unplaced, _unshared(tensors))
    number = "" if count == 1 else f"-{index + 1:05d}-of-{count:05d}"
    path = folder / f"model{number}-{digest[:16]}.safetensors"
    try:
        size = unplaced.stat().st_size
        os.replace(unplaced, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); the old model is still there") from error
    return {"name": path.name, "sha256": digest, "bytes": size}


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with storage of their own: safetensors refuses views of one storage."""
    seen: dict[int, None] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        owns = storage.nbytes() == tensor.numel() * tensor.element_size() and storage.data_ptr() not in seen
        seen[storage.data_ptr()] = None
        result[name] = tensor.detach() if owns else tensor.detach().clone(memory_format=torch.contiguous_format)
    return result
