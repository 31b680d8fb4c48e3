"""The two spellings of a plan: long objects, as it is read and checked, and short rows, as it is stored.

`fold` names every path, operator and quantization grid once and lets the rest refer to it by its place in a list;
`unfold` is its inverse. Both only move values about: what a value may be is checked on the long spelling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdiff_fx.graph.record import Record, expect, refuse

TABLES = ("strings", "specs")

_ENTRY = ("dtype", "shape", "parameter", "shard")
_LAYER = ("name", "operator", "weight", "activation", "reason")
_MAXIMUM_NESTING = 8


def fold(plan: Mapping[str, Any]) -> dict[str, Any]:
    """`plan` with short rows for `tensors` and `nodes`, and the tables that they refer to."""
    folded = _Folding(plan["tensors"])
    rows = [folded.node(record) for record in plan["nodes"]]
    changed = {"strings": folded.strings, "specs": folded.specs, "tensors": _nested(plan["tensors"]), "nodes": rows}
    return {**{key: plan[key] for key in plan if key not in changed}, **changed}


def unfold(plan: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The plan that `fold` was given. Raises CheckpointError for what `fold` does not write."""
    record = Record(plan, where)
    for table in TABLES:
        record.take(table, list)
    tensors = _flat(record.take("tensors", dict), f"{where}: tensors")
    unfolding = _Unfolding(plan["strings"], plan["specs"], list(tensors))
    nodes: list[dict[str, Any]] = []
    for place, row in record.items("nodes"):
        nodes.append(unfolding.node(expect(row, list, place), nodes, place))
    rest = {key: plan[key] for key in plan if key not in (*TABLES, "tensors", "nodes")}
    return {**rest, "tensors": tensors, "nodes": nodes}


def _nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """{"module path": {"leaf": [dtype, shape, parameter, shard]}}; a name is path, dot, leaf."""
    nested: dict[str, Any] = {}
    for name, entry in tensors.items():
        path, _, leaf = name.rpartition(".")
        nested.setdefault(path, {})[leaf] = [entry[field] for field in _ENTRY]
    return nested


def _flat(nested: Mapping[str, Any], where: str) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for path, leaves in nested.items():
        for leaf, row in expect(leaves, dict, f"{where}: {path!r:.60}").items():
            name = f"{path}.{leaf}" if path else leaf
            if name in tensors:
                refuse(where, f"tensor {name!r:.60} stands twice")
            if type(row) is not list or len(row) != len(_ENTRY):
                refuse(f"{where}: {name!r:.60}", f"{row!r:.60}, want [{', '.join(_ENTRY)}]")
            tensors[name] = dict(zip(_ENTRY, row, strict=True))
    return dict(sorted(tensors.items()))


def _default_names(target: str) -> tuple[str, str]:
    """What passes and torch.export call the node that reads a tensor."""
    flat = target.replace(".", "_")
    return flat, f"module_{flat}"


class _Folding:
    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.strings: list[str] = []
        self.specs: list[Any] = []
        self._tensors = {name: index for index, name in enumerate(tensors)}
        self._places: dict[str, int] = {}
        self._indices: dict[str, int] = {}

    def node(self, record: Mapping[str, Any]) -> list[Any]:
        """[op, ...] of a node; call_function, the usual one, has its operator's place in `strings` instead."""
        self._places[record["name"]] = len(self._places)
        extra = [self._meta(record["meta"])] if "meta" in record else []
        if record["op"] == "get_attr":
            flat, exported = _default_names(record["target"])
            spelled = {flat: 0, exported: 1}.get(record["name"], record["name"])
            return ["get_attr", self._tensors[record["target"]], spelled, *extra]
        if record["op"] == "placeholder":
            return ["placeholder", record["name"], *extra]
        args = [self._argument(item) for item in record["args"]]
        if record["op"] == "output":
            return ["output", record["name"], args, *extra]
        row = [self._index(record["target"]), record["name"], args, *(extra or [{}])]
        if "kwargs" in record:
            row.append({key: self._argument(item) for key, item in record["kwargs"].items()})
        return row if len(row) > 4 or extra else row[:3]

    def _index(self, text: str) -> int:
        if text not in self._indices:
            self._indices[text] = len(self.strings)
            self.strings.append(text)
        return self._indices[text]

    def _spec(self, spec: Any) -> int | None:
        if spec is None:
            return None
        if spec not in self.specs:
            self.specs.append(spec)
        return self.specs.index(spec)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._argument(item) for item in value]
        if isinstance(value, dict) and "node" in value:
            return {"n": self._places[value["node"]]}
        if isinstance(value, dict) and "tuple" in value:
            return {"tuple": self._argument(value["tuple"])}
        return value

    def _meta(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        short = dict(meta)
        if "module" in meta:
            short["module"] = self._index(meta["module"])
        if "layer" in meta:
            layer = dict(meta["layer"])
            layer |= {"weight": self._spec(layer["weight"]), "activation": self._spec(layer["activation"])}
            layer |= {key: self._index(layer[key]) for key in ("name", "operator", "reason")}
            short["layer"] = [layer[key] for key in _LAYER]
        return short


class _Unfolding:
    def __init__(self, strings: list[Any], specs: list[Any], tensors: list[str]) -> None:
        self._strings, self._specs, self._tensors = strings, specs, tensors

    def node(self, row: list[Any], before: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
        """The long spelling of a row; `before` are the nodes that it may read."""
        op = row[0] if row and isinstance(row[0], str) else "call_function"
        fields = {"get_attr": 3, "placeholder": 2, "output": 3}.get(op, 3)
        most = fields + (2 if op == "call_function" else 1)
        if not fields <= len(row) <= most:
            refuse(where, f"{row!r:.60}, want {fields} to {most} fields")
        node: dict[str, Any] = {"name": row[1], "op": op}
        if op == "get_attr":
            target = _item(self._tensors, row[1], f"{where}: tensor")
            names, name = _default_names(target), row[2]
            node |= {"name": name if isinstance(name, str) else _item(names, name, f"{where}: name"), "target": target}
        elif op == "call_function":
            node["target"] = _item(self._strings, row[0], f"{where}: target")
        if op in ("call_function", "output"):
            node["args"] = [self._argument(item, before, where) for item in expect(row[2], list, where)]
        if len(row) > 4:
            given = expect(row[4], dict, where)
            node["kwargs"] = {key: self._argument(item, before, where) for key, item in given.items()}
        if len(row) > fields and row[fields] != {}:
            node["meta"] = self._meta(expect(row[fields], dict, where), f"{where}: meta")
        return node

    def _argument(self, value: Any, before: Sequence[Mapping[str, Any]], where: str, depth: int = 0) -> Any:
        if depth > _MAXIMUM_NESTING:
            refuse(where, f"arguments nest more than {_MAXIMUM_NESTING} deep")
        if isinstance(value, list):
            return [self._argument(item, before, where, depth + 1) for item in value]
        if isinstance(value, dict) and "n" in value:
            return {"node": _item(before, value["n"], f"{where}: node")["name"]} if len(value) == 1 else value
        if isinstance(value, dict) and "tuple" in value:
            return {**value, "tuple": self._argument(value["tuple"], before, where, depth + 1)}
        return value

    def _meta(self, meta: Mapping[str, Any], where: str) -> dict[str, Any]:
        long = dict(meta)
        if "module" in meta:
            long["module"] = _item(self._strings, meta["module"], where)
        if "layer" in meta:
            if type(meta["layer"]) is not list or len(meta["layer"]) != len(_LAYER):
                refuse(where, f"layer {meta['layer']!r:.60}, want [{', '.join(_LAYER)}]")
            layer = dict(zip(_LAYER, meta["layer"], strict=True))
            layer |= {key: _item(self._strings, layer[key], where) for key in ("name", "operator", "reason")}
            for key in ("weight", "activation"):
                layer[key] = None if layer[key] is None else _item(self._specs, layer[key], where)
            long["layer"] = layer
        return long


def _item(table: Sequence[Any], index: Any, where: str) -> Any:
    if type(index) is not int or not 0 <= index < len(table):
        refuse(where, f"{index!r:.60}, want a place in a list of {len(table)}")
    return table[index]
