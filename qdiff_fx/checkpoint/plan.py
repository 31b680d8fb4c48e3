"""plan.json: everything of a stored model but its tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.checkpoint.layout import fold, unfold
from qdiff_fx.checkpoint.model import StoredModel
from qdiff_fx.checkpoint.operands import check_operands
from qdiff_fx.config import QDiffConfig
from qdiff_fx.errors import CheckpointError, ConfigError
from qdiff_fx.graph.arguments import DTYPES, Tokens, name_of, named
from qdiff_fx.graph.propagate import FakeInputs, propagate, size_hint
from qdiff_fx.graph.record import Record, expect, is_identifier, refuse, text
from qdiff_fx.graph.serialize import check_tensor_name, decode_graph, encode_graph
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.graph.stored_signature import (
    Shapes,
    decode_output,
    decode_signature,
    encode_signature,
    encode_structure,
)

FORMAT_VERSION = 2
_LONG_VERSION = 1
"""The version whose file is the plan as it is read: no rows, no tables."""

_LARGEST = 2**31


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """What the plan says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parameter: bool
    shard: int


def encode_plan(
    model: StoredModel,
    entries: Mapping[str, TensorEntry],
    library_version: str,
    where: str,
) -> dict[str, Any]:
    """The plan as a JSON object, without its shards and output tensors.

    Raises: CheckpointError for a graph or a setting that the format cannot hold.
    """
    name = type(model.plan).__name__
    return {
        "format_version": FORMAT_VERSION,
        "library_version": library_version,
        "name": name if is_identifier(name) else "GraphModule",
        "carrier": name_of(DTYPES, model.carrier, where),
        "config": model.config.to_dict(),
        "model_config": _plain(model.model_config, f"{where}: model_config"),
        "returns_dict": model.returns_dict,
        "calibration": _plain(model.calibration, f"{where}: calibration"),
        "signature": encode_signature(model.signature, model.plan.graph, where),
        "output": encode_structure(model.output.structure, "output", where),
        "output_tensors": [],
        "shards": [],
        "tensors": {
            name: {
                "dtype": name_of(DTYPES, entry.dtype, f"{where}: {name}"),
                "shape": list(entry.shape),
                "parameter": entry.parameter,
                "shard": entry.shard,
            }
            for name, entry in entries.items()
        },
        "nodes": encode_graph(model.plan, Tokens(carrier=model.carrier, device=torch.device("cpu")), where),
    }


def seal_plan(plan: Mapping[str, Any]) -> bytes:
    """The file's bytes, with a digest over everything else in it; a line a node and a module's tensors."""
    stored = fold(plan) if plan.get("format_version") == FORMAT_VERSION else plan
    sealed = {**stored, "digest": plan_digest(stored)}
    lines = [f"{_compact(key)}:{_broken(value)}" for key, value in sealed.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def open_plan(stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The plan in a file of any version, as `encode_plan` makes it.

    Raises: CheckpointError unless it is of a version that this library reads, whole, and spelled as `seal_plan` does.
    """
    _check_version(stored, where)
    if stored["format_version"] == _LONG_VERSION:
        return dict(stored)
    plan = unfold(stored, where)
    if plan_digest(fold(plan)) != stored["digest"]:  # the digest covers the order of keys too
        refuse(where, "is spelled in another way than qdiff_fx writes it")
    return plan


def plan_digest(plan: Mapping[str, Any]) -> str:
    """SHA-256 of the plan without its digest field."""
    return hashlib.sha256(_compact({key: plan[key] for key in plan if key != "digest"}).encode()).hexdigest()


def _check_version(plan: Mapping[str, Any], where: str) -> None:
    version = plan.get("format_version")
    if type(version) is not int or version not in (_LONG_VERSION, FORMAT_VERSION):
        raise CheckpointError(
            f"{where}: format_version={version!r:.60}, want {_LONG_VERSION} or {FORMAT_VERSION}; "
            f"load it with the version of qdiff_fx that wrote it, or save the model again"
        )
    if plan.get("digest") != plan_digest(plan):
        refuse(where, "its content does not match its digest")


def decode_entries(record: Record, shards: int) -> dict[str, TensorEntry]:
    """The tensors that the plan names."""
    entries: dict[str, TensorEntry] = {}
    where = record.at("tensors")
    for name, value in record.take("tensors", dict).items():
        check_tensor_name(name, where)
        entry = Record(value, f"{where}: {name}")
        shape = entry.items("shape")
        for place, size in shape:
            if not 0 <= expect(size, int, place) <= _LARGEST:
                refuse(place, f"{size}, want 0..{_LARGEST}")
        entries[name] = TensorEntry(
            dtype=named(DTYPES, entry.raw("dtype"), entry.at("dtype")),
            shape=tuple(size for _, size in shape),
            parameter=entry.take("parameter", bool),
            shard=entry.integer("shard", 0, shards - 1),
        )
        entry.finish()
    for name in entries:
        parts = name.split(".")
        if any(".".join(parts[:count]) in entries for count in range(1, len(parts))):
            refuse(where, f"{name!r:.60} lies inside another tensor's name")
    return entries


def complete_plan(plan: dict[str, Any], tensors: Mapping[str, Tensor], device: torch.device, where: str) -> None:
    """Read the plan back as `decode_model` will, and note what its outputs are.

    Raises: CheckpointError for whatever could be written but not be read.
    """
    record = Record(json.loads(_compact(plan)), where)
    for name in ("output_tensors", "shards", "tensors"):
        record.raw(name)
    _, plan["output_tensors"] = _decode(record, tensors, device)


def decode_model(record: Record, tensors: Mapping[str, Tensor], device: torch.device) -> StoredModel:
    """The model that the rest of the plan describes, checked and with fake values on its nodes."""
    record.raw("digest")
    stored = record.raw("output_tensors")
    model, found = _decode(record, tensors, device)
    if stored != found:
        refuse(record.at("output_tensors"), f"{stored!r:.60}, its graph makes {found!r:.60}")
    return model


def _decode(
    record: Record, tensors: Mapping[str, Tensor], device: torch.device
) -> tuple[StoredModel, list[dict[str, Any]]]:
    """The model, and dtype and example shape of every output."""
    where = record.where
    record.raw("format_version")
    record.text("library_version")
    carrier = named(DTYPES, record.raw("carrier"), record.at("carrier"))
    signature, shapes, hints = decode_signature(record.raw("signature"), record.at("signature"))
    if signature.input(signature.sample).dtype != carrier:
        refuse(record.at("carrier"), f"{carrier}, the sample is {signature.input(signature.sample).dtype}")
    tokens = Tokens(carrier=carrier, device=device)
    nodes = record.items("nodes")
    plan = decode_graph(nodes, signature.names, tensors, tokens, record.identifier("name"), record.at("nodes"))
    # One graph has one spelling, so that equal files mean equal graphs.
    for (place, stored), written in zip(nodes, encode_graph(plan, tokens, where), strict=True):
        if _compact(stored) != _compact(written):
            refuse(place, f"is spelled in another way than qdiff_fx writes it: {_compact(written):.200}")
    outputs = _infer_outputs(plan, signature, shapes, hints, device, where)
    model = StoredModel(
        plan=plan,
        config=_decode_config(record.raw("config"), record.at("config")),
        signature=signature,
        output=decode_output(record.raw("output"), len(outputs), record.at("output")),
        model_config=_decode_model_config(record.take("model_config", dict), record.at("model_config")),
        returns_dict=record.take("returns_dict", bool),
        calibration=record.take("calibration", dict),
    )
    record.finish()
    return model, outputs


def _infer_outputs(
    plan: fx.GraphModule,
    signature: CallSignature,
    shapes: Shapes,
    hints: Mapping[str, int],
    device: torch.device,
    where: str,
) -> list[dict[str, Any]]:
    """Put fake values on all nodes, check the integer operators; dtype and example shape of every output."""
    fakes = FakeInputs(hints)
    inputs = {item.name: fakes.tensor(shapes[item.name], item.dtype, device) for item in signature.inputs}
    propagate(plan, fakes.mode, inputs, where)
    check_operands(plan, where)
    outputs: Any = plan.graph.output_node().args[0]
    found = []
    for node in outputs:
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            refuse(where, f"output {node.name} is no tensor")
        dtype = name_of(DTYPES, value.dtype, where)
        found.append({"dtype": dtype, "shape": [size_hint(size) for size in value.shape]})
    return found


def _decode_config(value: Any, where: str) -> QDiffConfig:
    data = expect(value, dict, where)
    for item in fields(QDiffConfig):
        kind = type(item.default)
        if item.name in data and kind in (bool, int, str):
            expect(data[item.name], kind, f"{where}: {item.name}")
    for place, rule in ((f"{where}: rules", item) for item in expect(data.get("rules", []), list, where)):
        for name, entry in expect(rule, dict, place).items():
            if entry is not None:
                expect(entry, str if name in ("module", "operator") else int, place)
    if data.get("sample_input") is not None:
        text(data["sample_input"], where)
    try:
        return QDiffConfig.from_dict(data)
    except (ConfigError, TypeError, ValueError, OverflowError) as error:
        refuse(where, str(error))


def _decode_model_config(values: dict[str, Any], where: str) -> dict[str, Any]:
    for key in values:
        # diffusers makes attributes of them on a dict.
        if not is_identifier(key) or key.startswith("_") or hasattr(dict, key) or key in ("self", "kwargs"):
            refuse(where, f"{key!r:.60}, want plain names")
    return values


def _plain(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` in JSON types, without private entries."""
    public = {key: value for key, value in values.items() if not key.startswith("_")}
    try:
        plain: dict[str, Any] = json.loads(_compact(public))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: cannot be stored as JSON ({error}); want numbers, strings, lists") from error
    return plain


def _compact(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _broken(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(_compact(item) for item in value) + "\n]"
    if isinstance(value, dict) and value:
        return "{\n" + ",\n".join(f"{_compact(key)}:{_compact(item)}" for key, item in value.items()) + "\n}"
    return _compact(value)
