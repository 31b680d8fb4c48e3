"""Writes are atomic; reading damaged or hostile files raises CheckpointError."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff_fx.errors import CheckpointError
from qdiff_fx.safe_io import (
    TensorFile,
    check_digest,
    digest_field,
    file_digest,
    json_bytes,
    json_field,
    path_inside,
    read_json,
    read_tensors,
    remove_partial_files,
    replacing,
    write_bytes,
    write_json,
    write_tensors,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def _write_half(path: Path, failure: BaseException) -> None:
    with replacing(path) as partial:
        partial.write_bytes(b"half")
        raise failure


def test_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old")
    with pytest.raises(KeyboardInterrupt):
        _write_half(tmp_path / "a", KeyboardInterrupt())
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_full_disk_is_a_checkpoint_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old")
    with pytest.raises(CheckpointError, match=r"No space left.*free space"):
        _write_half(tmp_path / "a", OSError(28, "No space left on device"))
    assert (tmp_path / "a").read_bytes() == b"old"


def test_safetensors_failure_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_tensors(tmp_path / "file" / "x.safetensors", {"x": torch.zeros(1)})


def test_partial_files_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".index.json.0a1b2c3d.partial").write_bytes(b"half")
    (tmp_path / "index.json").write_bytes(b"{}")
    remove_partial_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_json_round_trip_is_exact_and_independent_of_key_order(value: dict[str, object]) -> None:
    assert json_bytes(value) == json_bytes(dict(reversed(value.items())))
    assert json.loads(json_bytes(value)) == value


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff\xfe\x00", b'{"a":' + b"[" * 100_000],
    ids=["empty", "cut", "list", "number", "nan", "repeated", "not-utf8", "deep"],
)
def test_damaged_json_is_a_checkpoint_error_naming_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_json(tmp_path / "index.json")


def test_missing_json_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_json(tmp_path / "index.json")


def test_json_file_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "index.json", {"a": [1, "é"]})
    assert read_json(tmp_path / "new" / "index.json") == {"a": [1, "é"]}


def test_json_field_takes_no_bool_for_an_integer() -> None:
    assert json_field({"rows": 3}, "rows", int, "f") == 3
    with pytest.raises(CheckpointError, match="rows=True, want int"):
        json_field({"rows": True}, "rows", int, "f")
    with pytest.raises(CheckpointError, match="f: field 'rows' is missing"):
        json_field({}, "rows", int, "f")
    with pytest.raises(CheckpointError, match="64 hexadecimal"):
        digest_field({"sha256": "abc"}, "sha256", "f")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../x", "a//b", ".hidden", "C:x", "a\\b", "a\n", "é"])
def test_names_that_are_not_plain_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="plain names"):
        path_inside(tmp_path, name)


def test_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "out").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="leads out"):
        path_inside(tmp_path / "set", "out/x")
    assert path_inside(tmp_path / "set", "a/b-1.safetensors") == tmp_path / "set" / "a" / "b-1.safetensors"


def test_tensors_round_trip_and_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6).reshape(2, 3).t(), "a": torch.tensor(1.5, dtype=torch.bfloat16)}
    digest = write_tensors(tmp_path / "1", tensors)
    assert write_tensors(tmp_path / "2", dict(reversed(tensors.items()))) == digest == file_digest(tmp_path / "2")
    loaded = read_tensors(tmp_path / "1", digest)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_truncated_tensor_file_is_a_checkpoint_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    digest = write_tensors(path, {"x": torch.ones(8)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x.safetensors.*truncated"):
        TensorFile(path)
    with pytest.raises(CheckpointError, match=r"SHA-256"):
        check_digest(path, digest)


def test_missing_tensor_is_a_checkpoint_error(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="'y' is missing"):
        TensorFile(tmp_path / "x").tensor("y")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        TensorFile(tmp_path / "absent")
