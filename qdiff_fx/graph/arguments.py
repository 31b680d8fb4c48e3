"""Arguments of graph nodes as JSON: what JSON has stands for itself, everything else is a tagged object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qdiff_fx.errors import CheckpointError
from qdiff_fx.graph.record import INTEGER_RANGE, Record, expect, finite, refuse, text

CARRIER = "carrier"
DEVICE = "device"

DTYPES: Mapping[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
MEMORY_FORMATS: Mapping[str, torch.memory_format] = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
LAYOUTS: Mapping[str, torch.layout] = {"strided": torch.strided}

_NON_FINITE: Mapping[str, float] = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_MAXIMUM_NESTING = 4
"""Operators take lists of lists at most (index.Tensor, einsum); one level to spare for the output's tuple."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the tokens stand for in one graph.

    Args:
      carrier: the dtype written as "carrier"; None where dtypes are meant literally.
      device: what "device" becomes.
    """

    carrier: torch.dtype | None
    device: torch.device


def encode_argument(value: Any, tokens: Tokens, where: str) -> Any:
    """`value` as JSON. Raises CheckpointError for a type that no operator on the allow-list takes."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        items = [encode_argument(item, tokens, where) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, torch.dtype):
        return {"dtype": CARRIER if value == tokens.carrier else name_of(DTYPES, value, where)}
    if isinstance(value, torch.device):
        return {"device": DEVICE}
    if isinstance(value, torch.memory_format):
        return {"memory_format": name_of(MEMORY_FORMATS, value, where)}
    if isinstance(value, torch.layout):
        return {"layout": name_of(LAYOUTS, value, where)}
    return encode_scalar(value, where)


def encode_scalar(value: Any, where: str) -> Any:
    """None, a bool, int, float or string as JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if value is None or isinstance(value, (bool, float, str)) or (isinstance(value, int) and value in INTEGER_RANGE):
        return value
    raise CheckpointError(f"{where}: holds a {type(value).__name__}, which the format cannot store; {value!r:.60}")


def decode_argument(value: Any, nodes: Mapping[str, fx.Node], tokens: Tokens, where: str, depth: int = 0) -> Any:
    """The argument that `encode_argument` wrote; `nodes` are those that stand before."""
    if depth > _MAXIMUM_NESTING:
        refuse(where, f"arguments nest more than {_MAXIMUM_NESTING} deep")
    if isinstance(value, list):
        return [decode_argument(item, nodes, tokens, where, depth + 1) for item in value]
    if not isinstance(value, dict) or "float" in value:
        return decode_scalar(value, where)
    record = Record(value, where)
    if len(value) != 1:
        refuse(where, f"{value!r:.60}, want an object with one tag")
    (tag,) = value
    content = record.raw(tag)
    if tag == "node":
        name = expect(content, str, where)
        if name not in nodes:
            refuse(where, f"node {name!r:.60} does not stand before this one")
        return nodes[name]
    if tag == "tuple":
        items = expect(content, list, where)
        return tuple(decode_argument(item, nodes, tokens, where, depth + 1) for item in items)
    if tag == "dtype":
        return tokens.carrier if content == CARRIER and tokens.carrier is not None else named(DTYPES, content, where)
    if tag == "device":
        if content != DEVICE:
            refuse(where, f"device {content!r:.60}, want {DEVICE!r}")
        return tokens.device
    if tag == "memory_format":
        return named(MEMORY_FORMATS, content, where)
    if tag == "layout":
        return named(LAYOUTS, content, where)
    return refuse(where, f"tag {tag!r:.60} is unknown")


def decode_scalar(value: Any, where: str) -> Any:
    """What `encode_scalar` wrote."""
    if isinstance(value, dict):
        record = Record(value, where)
        number = named(_NON_FINITE, record.raw("float"), where)
        record.finish()
        return number
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return finite(value, where)
    if isinstance(value, int):
        if value not in INTEGER_RANGE:
            refuse(where, "an integer of more than 64 bits")
        return value
    return text(value, where)


def named(table: Mapping[str, Any], name: Any, where: str) -> Any:
    """The table's entry for a stored name."""
    if not isinstance(name, str) or name not in table:
        refuse(where, f"{name!r:.60}, want one of {', '.join(table)}")
    return table[name]


def name_of(table: Mapping[str, Any], value: Any, where: str) -> str:
    """The name under which the table holds `value`."""
    for name, item in table.items():
        if item == value:
            return name
    raise CheckpointError(f"{where}: {value} cannot be stored; want one of {', '.join(table)}")
