"""A damaged or hostile folder is refused with one clear line, whatever the damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qdiff_fx
from qdiff_fx.checkpoint import read_model
from qdiff_fx.errors import CheckpointError
from qdiff_fx.safe_io import file_digest

Editor = Callable[[Callable[[dict[str, Any]], Any]], None]


def _node(plan: dict[str, Any], name: str) -> dict[str, Any]:
    """The stored node with this name."""
    found: dict[str, Any] = next(item for item in plan["nodes"] if item["name"] == name)
    return found


def _shard(folder: Path) -> Path:
    (path,) = folder.glob("model-*.safetensors")
    return path


def _refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_model(folder, torch.device("cpu"))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_undamaged_copy_loads(folder: Path, edit: Editor) -> None:
    edit(lambda plan: None)
    read_model(folder, torch.device("cpu"))


def test_a_missing_folder_and_one_without_a_plan(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no plan.json; want a folder that qdiff_fx.save wrote"):
        qdiff_fx.load(tmp_path / "nowhere")
    _refused(tmp_path, "holds no plan.json")


@pytest.mark.parametrize("version", [0, 3, 1.0, True, "1", None])
def test_another_format_version(folder: Path, edit: Editor, version: Any) -> None:
    edit(lambda plan: plan.update(format_version=version))
    _refused(folder, r"format_version=.*, want 1 or 2; load it with the version")


def test_an_edit_without_a_new_digest(folder: Path) -> None:
    path = folder / "plan.json"
    path.write_text(path.read_text().replace('"W', '"w').replace('"seed": 0', '"seed": 1'))
    _refused(folder, "does not match its digest")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1, "a": 2}', "[" * 100_000, '{"a": NaN}', "\xff\xfe"])
def test_a_plan_that_is_no_json_object(folder: Path, content: str) -> None:
    (folder / "plan.json").write_bytes(content.encode("latin-1"))
    _refused(folder, "plan.json: ")


def test_a_repeated_key(folder: Path) -> None:
    path = folder / "plan.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 1, "format_version": 1'))
    _refused(folder, "a key is repeated")


@pytest.mark.parametrize("field", ["nodes", "tensors", "shards", "signature", "config", "carrier", "output", "digest"])
def test_a_missing_field(folder: Path, edit: Editor, field: str) -> None:
    if field == "digest":
        plan = json.loads((folder / "plan.json").read_text())
        del plan["digest"]
        (folder / "plan.json").write_text(json.dumps(plan))
    else:
        edit(lambda plan: plan.pop(field))
    _refused(folder, field)


def test_an_unknown_field(folder: Path, edit: Editor) -> None:
    edit(lambda plan: plan.update(hook="os.system"))
    _refused(folder, r"unknown fields \['hook'\]")


def test_a_missing_shard(folder: Path) -> None:
    _shard(folder).unlink()
    _refused(folder, "is missing; copy it beside plan.json")


def test_a_truncated_shard(folder: Path) -> None:
    path = _shard(folder)
    path.write_bytes(path.read_bytes()[:-1])
    _refused(folder, r"\d+ bytes, want \d+")


def test_a_flipped_bit_in_a_shard(folder: Path) -> None:
    path = _shard(folder)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    _refused(folder, r"SHA-256 is \w+\.\.\., want")


@pytest.mark.parametrize(
    "name",
    [
        "../model-0123456789abcdef.safetensors",
        "/etc/passwd",
        "plan.json",
        "call.safetensors",
        "model-0123456789abcdef.safetensors/../../x",
        "model-0123456789ABCDEF.safetensors",
        "",
        3,
    ],
)
def test_a_shard_name_that_could_lead_elsewhere(folder: Path, edit: Editor, name: Any) -> None:
    edit(lambda plan: plan["shards"][0].update(name=name))
    _refused(folder, "shards")


def test_a_shard_that_is_a_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    path = _shard(folder)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    _refused(folder, "leads out of .* by a link")


def test_a_shard_that_is_a_folder(folder: Path) -> None:
    path = _shard(folder)
    path.unlink()
    path.mkdir()
    _refused(folder, "is missing")


def _replace_tensors(folder: Path, edit: Editor, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Write the shard anew with `change` applied, with size and hash that fit."""
    path = _shard(folder)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    digest, size = file_digest(path), path.stat().st_size
    edit(lambda plan: plan["shards"][0].update(sha256=digest, bytes=size))


def test_a_tensor_that_the_shard_lacks(folder: Path, edit: Editor) -> None:
    _replace_tensors(folder, edit, lambda tensors: tensors.pop("stem.bias"))
    _refused(folder, r"tensor 'stem.bias' is missing")


def test_a_tensor_that_the_plan_does_not_name(folder: Path, edit: Editor) -> None:
    _replace_tensors(folder, edit, lambda tensors: tensors.update(extra=torch.zeros(1)))
    _refused(folder, "tensor 'extra' is not in plan.json")


def test_a_tensor_of_another_type_than_the_plan_says(folder: Path, edit: Editor) -> None:
    _replace_tensors(folder, edit, lambda tensors: tensors.update({"stem.bias": torch.zeros(8, dtype=torch.int8)}))
    _refused(folder, r"tensor stem.bias is torch.int8 \[8\], want torch.float32 \[8\]")


@pytest.mark.parametrize(
    "name", ["forward", "graph", "stem.__class__", "_parameters", "stem..bias", "stem.bias.deeper", "a b", "training"]
)
def test_a_tensor_name_that_would_replace_a_part_of_the_module(folder: Path, edit: Editor, name: str) -> None:
    def change(plan: dict[str, Any]) -> None:
        plan["tensors"][name] = plan["tensors"]["head.bias"]

    edit(change)
    _refused(folder, "tensor|lies inside")


@pytest.mark.parametrize("size", [-1, 2**70, 1.5, True])
def test_a_tensor_size_that_cannot_be(folder: Path, edit: Editor, size: Any) -> None:
    edit(lambda plan: plan["tensors"]["stem.bias"].update(shape=[size]))
    _refused(folder, "stem.bias: shape")


# Operands of integer operators: their kernels read memory by these shapes.


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("down.weight_packed", torch.zeros(287, dtype=torch.uint8), r"weight is torch.uint8 \[287\], want .*\[288\]"),
        ("down.weight_packed", torch.zeros(288, dtype=torch.int8), "weight is torch.int8"),
        ("down.weight_scale", torch.zeros(8), "weight_scale is not positive and finite"),
        ("down.weight_scale", torch.full((8,), torch.nan), "weight_scale is not positive and finite"),
        ("down.weight_scale", torch.ones(7), "weight_scale is"),
        ("down.weight_zero_point", torch.full((8,), 16, dtype=torch.uint8), "weight_zero_point exceeds 4 bits"),
        ("down.weight_shift", torch.zeros(1, dtype=torch.uint8), "channel_shift is"),
        ("down.bias", torch.zeros(9), "bias is"),
        ("embed.weight_packed", torch.zeros(8, 3, dtype=torch.int8), r"weight is torch.int8 \[8, 3\]"),
        ("activation_quantizer_silu_inv_scale", torch.ones(5), "inv_scale is"),
        ("activation_quantizer_silu_inv_scale", torch.full((8,), torch.inf), "inv_scale is not positive"),
        ("stem.bias", torch.zeros(9), "aten.conv2d.default refuses its arguments"),
    ],
)
def test_a_constant_that_does_not_fit_its_operator(
    folder: Path, edit: Editor, name: str, tensor: torch.Tensor, match: str
) -> None:
    _replace_tensors(folder, edit, lambda tensors: tensors.update({name: tensor}))
    dtype = str(tensor.dtype).removeprefix("torch.")
    edit(lambda plan: plan["tensors"][name].update(dtype=dtype, shape=list(tensor.shape)))
    _refused(folder, match)


@pytest.mark.parametrize(
    ("name", "position", "value", "match"),
    [
        ("conv2d_default_3", 6, -1.0, "x_scale=-1.0"),
        ("conv2d_default_3", 7, 256, r"x_zero_point=256, want 0..255"),
        ("conv2d_default_3", 8, [8, 8, 3, 4], "weight is"),
        ("conv2d_default_3", 8, [8, 8, 3], "node conv2d_default_3: .* refuses its arguments"),
        ("conv2d_default_3", 9, [0, 2], "node conv2d_default_3: .* refuses its arguments"),
        ("conv2d_default_3", 10, [-1, 1], "refuses its arguments"),
        ("conv2d_default_3", 10, [2**40, 1], "node \\w+: "),
        ("conv2d_default_3", 12, 3, "groups"),
        ("conv2d_default_3", 13, {"dtype": "int8"}, "output_dtype"),
        ("conv2d_default_3", 0, {"node": "add_1"}, "want codes in torch.uint8"),
        ("conv2d_default_3", 1, {"node": "add_1"}, "weight is no stored tensor"),
        ("quantize_default_1", 2, 300, "zero_point=300"),
        ("quantize_default_1", 3, 255, "qmin=255"),
        ("quantize_default_1", 5, 4, "channel_axis=4"),
    ],
)
def test_a_literal_that_does_not_fit_its_operator(
    folder: Path, edit: Editor, name: str, position: int, value: Any, match: str
) -> None:
    edit(lambda plan: _node(plan, name)["args"].__setitem__(position, value))
    _refused(folder, match)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("config", "weight_bits"), 9),
        (("config", "weight_bits"), True),
        (("config", "seed"), "0"),
        (("config", "unknown"), 0),
        (("config", "rules"), [{"module": 3, "weight_bits": 8}]),
        (("model_config", "items"), 0),
        (("model_config", "_class_name"), "x"),
        (("signature", "sample"), "timestep_"),
        (("signature", "size_multiple"), 0),
        (("signature", "symbols"), {"d0": 1, "d1": 8, "d2": 8}),
        (("signature", "symbols"), {"x": 2}),
        (("signature", "parameters"), ["sample"]),
        (("signature", "structure"), {"sample": {"input": "sample"}}),
        (("output",), {"output": 1}),
        (("output",), {"constant": 0}),
        (("output_tensors",), [{"dtype": "float32", "shape": [2, 2, 8, 9]}]),
        (("carrier",), "bfloat16"),
        (("returns_dict",), 1),
        (("name",), "Net;import os"),
        (("calibration",), []),
        (("nodes",), []),
    ],
    ids=str,
)
def test_a_field_with_a_value_that_cannot_be(folder: Path, edit: Editor, path: tuple[str, ...], value: Any) -> None:
    def change(plan: dict[str, Any]) -> None:
        for key in path[:-1]:
            plan = plan[key]
        plan[path[-1]] = value

    edit(change)
    _refused(folder, path[0])


def test_a_deeply_nested_structure(folder: Path, edit: Editor) -> None:
    structure: dict[str, Any] = {"output": 0}
    for _ in range(100):
        structure = {"list": [structure]}
    edit(lambda plan: plan.update(output=structure))
    _refused(folder, "at most 32 deep")
