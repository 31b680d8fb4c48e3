"""A stored set is validated when it is read, and replaced only as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.calibration import dataset as dataset_module
from qdiff_fx.errors import CheckpointError, InputError


def _set(value: float = 0.0) -> CalibrationSet:
    calls = [((torch.full((3, 2, 4, 4), t + value), torch.tensor(t)), {"scale": 0.5}) for t in range(4)]
    return CalibrationSet.from_samples(calls)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _set().save(tmp_path / "set")
    return tmp_path / "set"


def test_loaded_set_is_the_saved_one(folder: Path) -> None:
    loaded = CalibrationSet.load(folder)
    assert loaded.fingerprint == _set().fingerprint
    assert (loaded.metadata, loaded.signature, loaded.timesteps) == (_set().metadata, _set().signature, (0, 1, 2, 3))


def test_saving_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    CalibrationSet.load(folder).save(tmp_path / "again")
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_set_can_be_saved_onto_itself(folder: Path) -> None:
    part = CalibrationSet.load(folder).split(0.5)[1]
    part.save(folder)
    assert CalibrationSet.load(folder).fingerprint == part.fingerprint
    assert len(list(folder.glob("*.safetensors"))) == 1


def test_failed_save_leaves_the_old_set_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise CheckpointError("No space left on device")

    monkeypatch.setattr(dataset_module, "write_index", full)
    with pytest.raises(CheckpointError):
        _set(1.0).save(folder)
    assert CalibrationSet.load(folder).fingerprint == _set().fingerprint


def test_folder_with_other_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something already"):
        _set().save(tmp_path)


def _edit(change: dict[str, Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(data | change))

    return edit


def _edit_shard(change: dict[str, Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / "index.json").read_text())
        data["shards"][0] |= change
        (folder / "index.json").write_text(json.dumps(data))

    return edit


def _truncate(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])


def _flip_last_bit(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "index.json").unlink(), r"index\.json: cannot be read"),
        (lambda folder: (folder / "index.json").write_text("{"), "not valid JSON"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), r"rows-.*cannot be"),
        (_truncate, r"rows-.*SHA-256"),
        (_flip_last_bit, r"rows-.*SHA-256"),
        (_edit({"format": "model"}), "not a calibration set"),
        (_edit({"format_version": 2}), "format_version=2, want 1"),
        (_edit({"complete": False}), "unfinished"),
        (_edit({"forms": []}), "form=0"),
        (_edit({"shards": [3]}), "want an object"),
        (_edit({"request": 3}), "request"),
        (_edit_shard({"file": "../../etc/passwd"}), "plain names"),
        (_edit_shard({"sha256": "0"}), "64 hexadecimal"),
        (_edit_shard({"rows": 5}), "shape"),
        (_edit_shard({"rows": -1}), "rows"),
        (_edit_shard({"form": -1}), "form=-1"),
    ],
)
def test_damaged_or_hostile_set_is_a_checkpoint_error(folder: Path, damage: Callable[[Path], None], match: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=match) as caught:
        CalibrationSet.load(folder)
    assert "\n" not in str(caught.value)


def test_quick_load_still_finds_a_truncated_shard(folder: Path) -> None:
    _truncate(folder)
    with pytest.raises(CheckpointError, match="truncated"):
        CalibrationSet.load(folder, verify=False)
