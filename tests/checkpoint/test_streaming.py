"""Stored models stream to their device: one tensor at a time is in main memory, whatever the number of shards."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdiff_fx
from qdiff_fx.checkpoint import read_model
from qdiff_fx.safe_io import TensorFile
from subjects import Preparer

SHARD = 1024


class _Watched(TensorFile):
    """Counts how many of the tensors that were read from the files live at the same time."""

    read: list[weakref.ref[Tensor]]
    most: int

    def tensor(self, name: str) -> Tensor:
        tensor = super().tensor(name)
        type(self).read.append(weakref.ref(tensor))
        type(self).most = max(type(self).most, sum(item() is not None for item in type(self).read))
        return tensor


def test_one_tensor_at_a_time_passes_through_main_memory(
    preparer: Preparer, sketch: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = qdiff_fx.convert(preparer.fitted(sketch, "w8a8"), backend="reference")
    qdiff_fx.save(quantized, tmp_path, max_shard_bytes=SHARD)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    _Watched.read, _Watched.most = [], 0
    monkeypatch.setattr("qdiff_fx.checkpoint.reader.TensorFile", _Watched)
    monkeypatch.setattr("qdiff_fx.checkpoint.reader.decode_model", lambda _record, tensors, _device: tensors)
    tensors: Any = read_model(tmp_path, torch.device("meta"))  # stands for any other device
    assert len(_Watched.read) == len(tensors) == len(quantized.plan.state_dict()) > 10
    assert _Watched.most == 1
    assert all(item.is_meta for item in tensors.values())
