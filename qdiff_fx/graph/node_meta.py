"""Node metadata as JSON: what lowering, reports and a change of carrier need of how a graph came about."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import fx

from qdiff_fx.errors import QuantSpecError
from qdiff_fx.graph.meta import (
    ATTENTION,
    BLOCK,
    FIXED_DTYPE,
    LAYER,
    MODULE_PATH,
    SPLIT_ADD,
    SPLIT_PART,
    AttentionPolicy,
    LayerPolicy,
    SplitPart,
)
from qdiff_fx.graph.record import Record, expect, refuse, text
from qdiff_fx.numerics.spec import QuantSpec

_LARGEST = 2**31


def encode_meta(node: fx.Node) -> dict[str, Any]:
    """The node's metadata; absent keys stay absent."""
    meta: dict[str, Any] = {}
    if path := MODULE_PATH.get(node):
        meta["module"] = path
    if (block := BLOCK.get(node)) is not None:
        meta["block"] = block
    for name, flag in (("fixed_dtype", FIXED_DTYPE), ("split_add", SPLIT_ADD)):
        if flag.get(node):
            meta[name] = True
    if (layer := LAYER.get(node)) is not None:
        meta["layer"] = asdict(layer)
    if (attention := ATTENTION.get(node)) is not None:
        meta["attention"] = asdict(attention)
    if (part := SPLIT_PART.get(node)) is not None:
        meta["split_part"] = asdict(part)
    return meta


def decode_meta(value: Any, where: str) -> dict[str, Any]:
    """Entries for `node.meta`. Raises CheckpointError for what `encode_meta` does not write."""
    record = Record(value, f"{where}: meta")
    meta: dict[str, Any] = {}
    if "module" in record:
        meta[MODULE_PATH.name] = record.text("module")
    if "block" in record:
        meta[BLOCK.name] = record.integer("block", 0, _LARGEST)
    for name, flag in (("fixed_dtype", FIXED_DTYPE), ("split_add", SPLIT_ADD)):
        if name in record:
            if record.take(name, bool) is not True:
                refuse(record.at(name), "False, want True or nothing")
            meta[flag.name] = True
    if "layer" in record:
        inner = Record(record.raw("layer"), record.at("layer"))
        meta[LAYER.name] = LayerPolicy(
            name=inner.text("name"),
            operator=inner.text("operator"),
            weight=_spec(inner.raw("weight"), inner.at("weight")),
            activation=_spec(inner.raw("activation"), inner.at("activation")),
            reason=inner.text("reason"),
        )
        inner.finish()
    if "attention" in record:
        inner = Record(record.raw("attention"), record.at("attention"))
        meta[ATTENTION.name] = AttentionPolicy(
            name=inner.text("name"),
            query_key_value=_spec(inner.raw("query_key_value"), inner.at("query_key_value")),
            probabilities=_spec(inner.raw("probabilities"), inner.at("probabilities")),
        )
        inner.finish()
    if "split_part" in record:
        inner = Record(record.raw("split_part"), record.at("split_part"))
        meta[SPLIT_PART.name] = SplitPart(
            cat=text(inner.raw("cat"), inner.at("cat")),
            index=inner.integer("index", 0, _LARGEST),
            start=inner.integer("start", 0, _LARGEST),
            stop=inner.integer("stop", 0, _LARGEST),
        )
        inner.finish()
    record.finish()
    return meta


def _spec(value: Any, where: str) -> QuantSpec | None:
    if value is None:
        return None
    record = Record(value, where)
    bits = record.integer("bits", 2, 8)
    flags = {name: expect(record.raw(name), bool, where) for name in ("signed", "symmetric", "narrow", "per_channel")}
    record.finish()
    try:
        return QuantSpec(bits=bits, **flags)
    except QuantSpecError as error:
        refuse(where, str(error))
