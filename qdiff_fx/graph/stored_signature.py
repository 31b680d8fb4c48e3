"""Call signatures and output structures as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from qdiff_fx.errors import CheckpointError
from qdiff_fx.graph.arguments import DTYPES, decode_scalar, encode_scalar, name_of, named
from qdiff_fx.graph.outputs import OutputStructure
from qdiff_fx.graph.propagate import SMALLEST_DYNAMIC, Dimension, size_hint
from qdiff_fx.graph.record import MAXIMUM_DEPTH, Record, expect, refuse, text
from qdiff_fx.graph.serialize import check_input_name
from qdiff_fx.graph.signature import CallSignature, GraphInput

_LARGEST = 2**31
Shapes = Mapping[str, Sequence[Dimension]]


def encode_signature(signature: CallSignature, graph: fx.Graph, where: str) -> dict[str, Any]:
    """The signature with symbolic shapes as they are in the graph's fake values."""
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    symbols: dict[str, str] = {}
    hints: dict[str, int] = {}
    inputs = []
    for item in signature.inputs:
        check_input_name(item.name, where)
        shape: list[Dimension] = []
        value = placeholders[item.name].meta["val"]
        for size, size_in_graph in zip(item.shape, value.shape, strict=True):
            if size is not None:
                shape.append(size)
                continue
            symbol = symbols.setdefault(str(size_in_graph), f"d{len(symbols)}")
            hints.setdefault(symbol, max(SMALLEST_DYNAMIC, size_hint(size_in_graph)))
            shape.append(symbol)
        dtype = name_of(DTYPES, item.dtype, f"{where}: {item.name}")
        inputs.append({"name": item.name, "argument": item.argument, "dtype": dtype, "shape": shape})
    return {
        "inputs": inputs,
        "symbols": hints,
        "parameters": list(signature.parameters),
        "structure": {
            name: encode_structure(node, "input", f"{where}: {name}") for name, node in signature.structure.items()
        },
        "sample": signature.sample,
        "timestep": signature.timestep,
        "size_multiple": signature.size_multiple,
    }


def decode_signature(value: Any, where: str) -> tuple[CallSignature, Shapes, dict[str, int]]:
    """The signature, the symbolic shape of each input, and the size that each symbol had in calibration."""
    record = Record(value, where)
    hints = _hints(record.raw("symbols"), record.at("symbols"))
    inputs: list[GraphInput] = []
    shapes: dict[str, list[Dimension]] = {}
    for place, item in record.items("inputs"):
        entry = Record(item, place)
        name = entry.text("name")
        check_input_name(name, place)
        if name in shapes:
            refuse(place, f"input {name!r} stands twice")
        shapes[name] = _shape(entry.items("shape"), hints)
        inputs.append(
            GraphInput(
                name=name,
                argument=entry.text("argument"),
                dtype=named(DTYPES, entry.raw("dtype"), entry.at("dtype")),
                shape=tuple(None if isinstance(size, str) else size for size in shapes[name]),
            )
        )
        entry.finish()
    parameters = tuple(text(item, place) for place, item in record.items("parameters"))
    structure = record.take("structure", dict)
    leaves: list[Any] = []
    for name, node in structure.items():
        if name not in parameters:
            refuse(record.at("structure"), f"{name!r:.60} is none of the parameters")
        structure[name] = decode_structure(node, "input", f"{record.at('structure')}: {name}", leaves)
    if sorted(leaves) != sorted(shapes):
        refuse(record.at("structure"), f"holds inputs {leaves!r:.60}, want each of {', '.join(shapes)} once")
    if len(set(parameters)) != len(parameters) or any(item.argument not in structure for item in inputs):
        refuse(record.at("parameters"), "want each once, and one for every input")
    sample = _one_of(record.raw("sample"), shapes, record.at("sample"))
    batch = next(iter(shapes[sample]), None)
    signature = CallSignature(
        inputs=tuple(
            replace(item, batched=isinstance(batch, str) and shapes[item.name][:1] == [batch]) for item in inputs
        ),
        parameters=parameters,
        structure=structure,
        sample=sample,
        timestep=_optional(record.raw("timestep"), shapes, record.at("timestep")),
        size_multiple=record.integer("size_multiple", 1, 2**16),
    )
    record.finish()
    if not signature.input(signature.sample).dtype.is_floating_point:
        refuse(record.at("sample"), f"{signature.sample} is no floating tensor")
    return signature, shapes, hints


def encode_structure(node: Any, leaf: str, where: str) -> Any:
    """A nesting of inputs or outputs; constants may be non-finite."""
    ((kind, content),) = node.items()
    if kind == leaf:
        return {kind: content}
    if kind == "constant":
        return {kind: encode_scalar(content, where)}
    if kind == "dict":
        if not all(isinstance(key, str) for key in content):
            raise CheckpointError(f"{where}: a dict with keys {list(content)!r:.60}; only strings can be stored")
        return {kind: {key: encode_structure(item, leaf, where) for key, item in content.items()}}
    return {kind: [encode_structure(item, leaf, where) for item in content]}


def decode_structure(value: Any, leaf: str, where: str, leaves: list[Any], depth: int = 0) -> dict[str, Any]:
    """What `encode_structure` wrote; the content of its leaves is appended to `leaves`."""
    record = Record(value, where)
    if len(value) != 1 or depth > MAXIMUM_DEPTH:
        refuse(where, f"want an object with one field, at most {MAXIMUM_DEPTH} deep")
    (kind,) = value
    content = record.raw(kind)
    if kind == leaf:
        leaves.append(expect(content, str if leaf == "input" else int, where))
        return {kind: content}
    if kind == "constant":
        return {kind: decode_scalar(content, where)}
    if kind == "dict":
        items = expect(content, dict, where).items()
        return {kind: {text(key, where): decode_structure(item, leaf, where, leaves, depth + 1) for key, item in items}}
    if kind not in ("list", "tuple"):
        refuse(where, f"{kind!r:.60} is no {leaf}, constant, list, tuple or dict")
    return {kind: [decode_structure(item, leaf, where, leaves, depth + 1) for item in expect(content, list, where)]}


def decode_output(value: Any, count: int, where: str) -> OutputStructure:
    """The output structure over `count` tensors."""
    leaves: list[Any] = []
    structure = decode_structure(value, "output", where, leaves)
    if sorted(leaves) != list(range(count)):
        refuse(where, f"holds outputs {leaves!r:.60}, want each of 0..{count - 1} once")
    return OutputStructure(structure=structure)


def _hints(value: Any, where: str) -> dict[str, int]:
    record = Record(value, where)
    hints = {}
    for index in range(len(value)):
        hints[f"d{index}"] = record.integer(f"d{index}", SMALLEST_DYNAMIC, _LARGEST)
    return hints


def _shape(items: Sequence[tuple[str, Any]], hints: Mapping[str, int]) -> list[Dimension]:
    if len(items) > 8:
        refuse(items[0][0], f"{len(items)} dimensions, want at most 8")
    shape: list[Dimension] = []
    for place, size in items:
        known = size in hints if isinstance(size, str) else type(size) is int and 0 <= size <= _LARGEST
        if not known:
            refuse(place, f"{size!r:.60}, want a size or one of the symbols")
        shape.append(size)
    return shape


def _one_of(value: Any, names: Mapping[str, Any], where: str) -> str:
    name = text(value, where)
    if name not in names:
        refuse(where, f"{name!r:.60}, want one of {', '.join(names)}")
    return name


def _optional(value: Any, names: Mapping[str, Any], where: str) -> str | None:
    return None if value is None else _one_of(value, names, where)
