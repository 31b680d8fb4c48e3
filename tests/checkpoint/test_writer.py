"""A folder holds a whole model at every moment: the old one or the new one."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from qdiff_fx.checkpoint import StoredModel, read_model, write_model
from qdiff_fx.checkpoint.plan import FORMAT_VERSION
from qdiff_fx.config import QDiffConfig
from qdiff_fx.errors import CheckpointError
from qdiff_fx.graph.edit import get_tensor, set_tensor

CPU = torch.device("cpu")
GOLDEN_OF_TODAY = Path(__file__).parents[1] / "golden" / f"v{FORMAT_VERSION}"


@pytest.fixture
def old(folder: Path) -> StoredModel:
    return read_model(folder, CPU)


def _changed(model: StoredModel) -> StoredModel:
    """The same graph with another bias."""
    bias = get_tensor(model.plan, "head.bias")
    set_tensor(model.plan, "head.bias", nn.Parameter(bias + 1, requires_grad=False))
    return model


def _bias(folder: Path) -> torch.Tensor:
    return get_tensor(read_model(folder, CPU).plan, "head.bias")


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "call.safetensors"}


def test_what_was_read_is_written_byte_for_byte(tmp_path: Path) -> None:
    write_model(read_model(GOLDEN_OF_TODAY, CPU), tmp_path / "copy")
    write_model(read_model(tmp_path / "copy", CPU), tmp_path / "again")
    assert _files(tmp_path / "again") == _files(tmp_path / "copy")


def test_an_older_file_is_written_as_it_was_but_for_settings_that_it_did_not_know(tmp_path: Path) -> None:
    write_model(read_model(GOLDEN_OF_TODAY, CPU), tmp_path / "copy")
    files = [_files(folder) for folder in (GOLDEN_OF_TODAY, tmp_path / "copy")]
    old, new = (json.loads(item.pop("plan.json")) for item in files)
    assert files[0] == files[1]
    for plan in (old, new):
        del plan["digest"]  # of everything else in it
    assert new == old | {"config": QDiffConfig.from_dict(old["config"]).to_dict()}


def test_a_file_of_the_first_version_is_written_as_one_of_today(old: StoredModel, tmp_path: Path) -> None:
    write_model(old, tmp_path / "copy")
    again = read_model(tmp_path / "copy", CPU)
    assert again.plan.code == old.plan.code and replace(again, plan=old.plan) == old
    assert f'"format_version":{FORMAT_VERSION},' in (tmp_path / "copy" / "plan.json").read_text()


def test_tensors_are_equal_and_parameters_stay_parameters(old: StoredModel, tmp_path: Path) -> None:
    write_model(old, tmp_path)
    loaded = read_model(tmp_path, CPU)
    state = loaded.plan.state_dict()
    for name, tensor in old.plan.state_dict().items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype
    assert dict(loaded.plan.named_parameters()).keys() == dict(old.plan.named_parameters()).keys()
    assert not any(parameter.requires_grad for parameter in loaded.plan.parameters())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_integer_weights_are_mapped_not_copied(folder: Path) -> None:
    model = read_model(folder, CPU)
    (path,) = folder.glob("model-*.safetensors")
    address = get_tensor(model.plan, "down.weight_packed").data_ptr()
    with open("/proc/self/maps") as maps:
        mapped = [line.split()[0].split("-") for line in maps if str(path) in line]
    assert any(int(start, 16) <= address < int(stop, 16) for start, stop in mapped)


def test_shards_hold_at_most_the_limit(old: StoredModel, tmp_path: Path) -> None:
    write_model(old, tmp_path, max_shard_bytes=500)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) >= 3
    assert [name[: len("model-00001-of-00003")] for name in names] == [
        f"model-{index + 1:05d}-of-{len(names):05d}" for index in range(len(names))
    ]
    loaded = read_model(tmp_path, CPU).plan.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in old.plan.state_dict().items())
    sizes = [sum(item.nbytes for item in part.values()) for part in _by_shard(tmp_path, loaded)]
    assert max(sizes) <= 500


def _by_shard(folder: Path, state: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    from safetensors import safe_open

    parts = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            parts.append({name: state[name] for name in file.keys()})  # noqa: SIM118, a safetensors file is no dict
    return parts


def test_a_limit_that_is_no_size_is_refused(old: StoredModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="max_shard_bytes=0"):
        write_model(old, tmp_path, max_shard_bytes=0)


def test_a_save_over_an_old_model_leaves_no_old_shards(old: StoredModel, folder: Path) -> None:
    write_model(old, folder, max_shard_bytes=1000)
    write_model(_changed(old), folder)
    assert len(list(folder.glob("model-*"))) == 1
    assert (folder / "call.safetensors").exists()  # what is not ours stays


def test_the_files_can_be_read_by_whom_the_umask_lets(old: StoredModel, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_model(old, tmp_path / "new")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o644}


class _Killed(BaseException):
    """Like SIGKILL: no handler runs."""


def _kill_at(step: int, action: Callable[[], Any], snapshot: Callable[[], None]) -> bool:
    """Run `action`, copying the folder away as it is before file operation number `step`; whether it came so far."""
    count = 0
    real = {"replace": os.replace, "fsync": os.fsync, "unlink": Path.unlink}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                snapshot()
                raise _Killed
            return real[name](*args, **kwargs)

        return call

    with (
        patch("os.replace", counted("replace")),
        patch("os.fsync", counted("fsync")),
        patch.object(Path, "unlink", counted("unlink")),
    ):
        try:
            action()
        except _Killed:
            return True
    return False


def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_model(
    old: StoredModel, folder: Path, tmp_path: Path
) -> None:
    write_model(old, folder, max_shard_bytes=2000)
    before = _bias(folder).clone()
    pristine = tmp_path / "pristine"
    shutil.copytree(folder, pristine)
    new = _changed(old)
    seen = []
    step = 1
    while True:
        work, left = tmp_path / f"work{step}", tmp_path / f"left{step}"
        shutil.copytree(pristine, work)

        def save(work: Path = work) -> None:
            write_model(new, work, max_shard_bytes=2000)

        def snapshot(work: Path = work, left: Path = left) -> None:
            shutil.copytree(work, left)

        if not _kill_at(step, save, snapshot):
            break
        seen.append(torch.equal(_bias(left), before))
        # The next save cleans up what the killed one left.
        write_model(new, left)
        assert len(list(left.glob("model-*"))) == 1
        assert not list(left.glob(".*"))
        step += 1
    assert len(seen) > 8
    assert seen == sorted(seen, reverse=True) and seen[0] and not seen[-1]


@pytest.mark.parametrize("failing", ["qdiff_fx.safe_io.save_file", "qdiff_fx.checkpoint.writer.write_bytes"])
def test_a_full_disk_leaves_the_old_model(old: StoredModel, folder: Path, failing: str) -> None:
    before = _bias(folder).clone()
    error: Exception = OSError(28, "No space left on device")
    if failing.endswith("write_bytes"):
        error = CheckpointError("plan.json: cannot be written (No space left on device)")
    with patch(failing, side_effect=error), pytest.raises(CheckpointError, match="No space left on device"):
        write_model(_changed(old), folder)
    assert torch.equal(_bias(folder), before)
    assert not list(folder.glob(".*"))


def test_a_folder_that_is_a_file_is_refused(old: StoredModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        write_model(old, tmp_path / "file")


def test_a_graph_that_cannot_be_stored_is_refused_before_anything_is_written(old: StoredModel, folder: Path) -> None:
    before = _files(folder)
    node = next(item for item in old.plan.graph.nodes if item.name == "silu")
    node.target = torch.ops.aten.bernoulli.default
    with pytest.raises(CheckpointError, match=r"node silu: operator aten.bernoulli.default is not on the list"):
        write_model(old, folder)
    assert _files(folder) == before


def test_a_config_that_is_no_json_is_refused(old: StoredModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model_config: cannot be stored as JSON"):
        write_model(replace(old, model_config={"hook": object()}), tmp_path)


def test_tensors_that_share_storage_are_stored_apart(old: StoredModel, tmp_path: Path) -> None:
    both = torch.arange(16.0)
    for name, part in (("down.bias", both[:8]), ("grouped.bias", both[8:])):
        set_tensor(old.plan, name, nn.Parameter(part, requires_grad=False))
    write_model(old, tmp_path)
    loaded = read_model(tmp_path, CPU)
    assert torch.equal(get_tensor(loaded.plan, "down.bias"), both[:8])
    assert torch.equal(get_tensor(loaded.plan, "grouped.bias"), both[8:])
