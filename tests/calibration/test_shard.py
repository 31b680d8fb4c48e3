"""Packed rows come back bit by bit; repeated ones are stored once; damage is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qdiff_fx.calibration.shard import Shard, pack_rows
from qdiff_fx.calibration.split_call import CallRows, split_call
from qdiff_fx.calibration.storage import make_shard
from qdiff_fx.errors import CheckpointError
from qdiff_fx.safe_io import file_digest, write_tensors


def _rows(size: int = 6) -> CallRows:
    torch.manual_seed(1)
    context = torch.randn(1, 3, 4).expand(size, 3, 4)
    return split_call((torch.randn(size, 2, 4, 4), torch.arange(size), context), {"mask": torch.ones(5) > 0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool])
def test_rows_come_back_bit_by_bit_in_any_order(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = split_call((torch.randn(6, 2, 4).to(dtype), torch.arange(6)), {})
    order = torch.tensor([4, 0, 0, 5])
    for shard in (make_shard(rows.form, rows.timesteps, rows.leaves, folder) for folder in (None, tmp_path)):
        assert torch.equal(shard.leaf(0, order), rows.leaves[0][order])
        assert torch.equal(shard.timesteps, rows.timesteps)
        shard.check(content=True)


def test_repeated_rows_are_stored_once() -> None:
    rows = _rows()
    packed = pack_rows(rows.form, rows.timesteps, rows.leaves)
    assert packed["leaf.000"].shape == (6, 2, 4, 4)
    assert packed["leaf.002"].shape == (1, 3, 4)
    shard = Shard(rows.form, 6, tensors=packed)
    assert torch.equal(shard.leaf(2, torch.tensor([0, 5])), rows.leaves[2][:2])


def test_digest_sees_every_bit_of_a_row_and_key_only_what_rows_of_a_call_share() -> None:
    rows = _rows()
    before = pack_rows(rows.form, rows.timesteps, rows.leaves)
    sample = rows.leaves[0].clone()
    sample[2, 0, 0, 0] += 1e-6
    mask = rows.leaves[3].clone()
    mask[3, 0] = False
    after = pack_rows(rows.form, rows.timesteps, (sample, *rows.leaves[1:3], mask))
    assert before["digest"].ne(after["digest"]).any(1).tolist() == [False, False, True, True, False, False]
    assert before["key"].ne(after["key"]).tolist() == [False, False, False, True, False, False]
    assert len(set(before["key"].tolist())) == 1


def _damage(tensors: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    damaged: dict[str, Any] = {
        "missing leaf": {k: v for k, v in tensors.items() if k != "leaf.000"},
        "missing digest": {k: v for k, v in tensors.items() if k != "digest"},
        "fewer rows": tensors | {"leaf.000": tensors["leaf.000"][:5].clone()},
        "other dtype": tensors | {"leaf.000": tensors["leaf.000"].double()},
        "index out of range": tensors | {"index.002": tensors["index.002"] + 1},
        "negative index": tensors | {"index.002": tensors["index.002"] - 1},
        "index of other type": tensors | {"index.002": tensors["index.002"].float()},
    }
    return damaged[change]


@pytest.mark.parametrize(
    "change",
    [
        "missing leaf",
        "missing digest",
        "fewer rows",
        "other dtype",
        "index out of range",
        "negative index",
        "index of other type",
    ],
)
def test_file_that_does_not_fit_its_form_is_refused(tmp_path: Path, change: str) -> None:
    rows, path = _rows(), tmp_path / "rows.safetensors"
    write_tensors(path, _damage(pack_rows(rows.form, rows.timesteps, rows.leaves), change))
    with pytest.raises(CheckpointError, match=r"rows\.safetensors"):
        Shard(rows.form, 6, path=path, digest=file_digest(path)).check(content=True)
