"""A converted graph as JSON and back.

fx pastes names into Python source that it executes, so nothing reaches a graph unchecked: targets come from an
allow-list, names are plain identifiers, attributes are known tensors.
"""

from __future__ import annotations

import builtins
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qdiff_fx.errors import CheckpointError
from qdiff_fx.graph.allowlist import is_allowed, resolve_target, target_name
from qdiff_fx.graph.arguments import Tokens, decode_argument, encode_argument
from qdiff_fx.graph.meta import FIXED_DTYPE
from qdiff_fx.graph.node_meta import decode_meta, encode_meta
from qdiff_fx.graph.record import Record, expect, is_identifier, refuse

_MAXIMUM_NODES = 200_000
_RESERVED = frozenset((*dir(builtins), "self", "torch", "device", "inf", "nan", "operator", "math", "fx_pytree"))
"""A parameter of generated code by one of these names would hide what the code itself uses."""


def encode_graph(graph_module: fx.GraphModule, tokens: Tokens, where: str) -> list[dict[str, Any]]:
    """The nodes as JSON objects.

    Args:
      tokens: the carrier type, which is written as a token; a dtype that is meant literally keeps its name.
      where: the file that is written, for errors.

    Raises: CheckpointError naming the node and the target, name or argument that the format cannot hold.
    """
    return [_encode_node(node, tokens, f"{where}: node {node.name}") for node in graph_module.graph.nodes]


def decode_graph(
    records: Sequence[tuple[str, Any]],
    inputs: Sequence[str],
    tensors: Mapping[str, Tensor],
    tokens: Tokens,
    class_name: str,
    where: str,
) -> fx.GraphModule:
    """The GraphModule that `encode_graph` wrote, without fake values.

    Args:
      records: the stored nodes with their places.
      inputs: names of the placeholders, in order.
      tensors: the stored tensors; each must be used.
      where: the place of the list, for errors.

    Raises: CheckpointError naming the place of whatever is not as `encode_graph` writes it.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    pending = list(inputs)
    used: dict[str, None] = {}
    if not 0 < len(records) <= _MAXIMUM_NODES:
        refuse(where, f"{len(records)} nodes, want 1 to {_MAXIMUM_NODES}")
    for index, (place, value) in enumerate(records):
        record = Record(value, place)
        name = record.identifier("name")
        record.where = where = f"{place} ({name})"
        op = record.text("op")
        if name in nodes:
            refuse(where, "the name is taken by an earlier node")
        if (op == "output") != (index == len(records) - 1):
            refuse(where, "want one output node, at the end")
        meta = decode_meta(record.raw("meta"), where) if "meta" in record else {}
        literal = Tokens(carrier=None, device=tokens.device) if meta.get(FIXED_DTYPE.name) else tokens
        target: str | Callable[..., Any] = op
        args: Any = ()
        kwargs: dict[str, Any] = {}
        if op == "placeholder":
            if not pending or pending.pop(0) != name:
                refuse(where, f"inputs are {', '.join(inputs)}, in this order")
            target = name
        elif op == "get_attr":
            target = record.text("target")
            if target not in tensors:
                refuse(where, f"tensor {target!r:.60} is not in the file")
            used[target] = None
        elif op in ("call_function", "output"):
            if op == "call_function":
                target = _target(record.text("target"), where)
            args, kwargs = _arguments(record, nodes, literal, target)
            if op == "output" and not _is_output(args):
                refuse(where, "want one tuple of nodes")
        else:
            refuse(where, f"op {op!r:.60} is none of placeholder, get_attr, call_function, output")
        record.finish()
        node = graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            refuse(where, "the name is reserved")
        node.meta.update(meta)
        nodes[name] = node
    if pending:
        refuse(where, f"inputs {', '.join(pending)} have no placeholder")
    unused = [name for name in tensors if name not in used]
    if unused:
        refuse(where, f"tensor {unused[0]!r} is used by no node")
    graph.lint()
    result = fx.GraphModule(dict(tensors), graph, class_name=class_name)
    return result.eval()


def check_tensor_name(name: str, where: str) -> None:
    """Raise CheckpointError unless `name` is a dotted path that a module can hold: "down.0.weight"."""
    for part in name.split("."):
        # What nn.Module or fx.GraphModule have under this name must not be replaced.
        if not (is_identifier(part) or part.isdecimal()) or hasattr(fx.GraphModule, part) or part in _INSTANCE_NAMES:
            refuse(where, f"tensor name {name!r:.60}, want dotted plain names")


def check_input_name(name: str, where: str) -> None:
    """Raise CheckpointError unless `name` may become a parameter of generated code."""
    if not is_identifier(name) or name in _RESERVED:
        refuse(where, f"input name {name!r:.60}, want a plain name that Python does not use itself")


_INSTANCE_NAMES = frozenset((*vars(nn.Module()), *vars(fx.GraphModule({}, fx.Graph()))))


def _encode_node(node: fx.Node, tokens: Tokens, where: str) -> dict[str, Any]:
    record: dict[str, Any] = {"name": node.name, "op": node.op}
    if not is_identifier(node.name):
        raise CheckpointError(f"{where}: the name cannot be stored; want letters, digits and underscores")
    literal = Tokens(carrier=None, device=tokens.device) if FIXED_DTYPE.get(node) else tokens
    if node.op == "placeholder":
        check_input_name(str(node.target), where)
    elif node.op == "get_attr":
        record["target"] = str(node.target)
    elif node.op in ("call_function", "output"):
        if node.op == "call_function":
            name = target_name(node.target)
            if name is None:
                raise CheckpointError(
                    f"{where}: operator {node.target} is not on the list of operators that a file may call; "
                    f"express it by listed ones (qdiff_fx/graph/allowlist.py)"
                )
            record["target"] = name
        record["args"] = [encode_argument(item, literal, where) for item in node.args]
        if node.kwargs:
            record["kwargs"] = {key: encode_argument(item, literal, where) for key, item in node.kwargs.items()}
    else:
        raise CheckpointError(f"{where}: a {node.op} node cannot be stored; convert the model first")
    meta = encode_meta(node)
    if meta:
        record["meta"] = meta
    return record


def _target(name: str, where: str) -> Callable[..., Any]:
    target = resolve_target(name)
    if target is None:
        if is_allowed(name):
            raise CheckpointError(f"{where}: this torch {torch.__version__} has no {name}; install a newer one")
        refuse(where, f"target {name!r:.60} is not on the list of operators that a file may call")
    return target


def _arguments(
    record: Record, nodes: Mapping[str, fx.Node], tokens: Tokens, target: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    where = record.where
    args = tuple(decode_argument(item, nodes, tokens, place) for place, item in record.items("args"))
    kwargs: dict[str, Any] = {}
    if "kwargs" in record:
        given = expect(record.raw("kwargs"), dict, where)
        schema = target._schema.arguments if isinstance(target, torch._ops.OpOverload) else ()
        allowed = [argument.name for argument in schema]
        for key, item in given.items():
            # fx writes the key into its source as it is.
            if key not in allowed or not is_identifier(key):
                refuse(where, f"argument {key!r:.60} is unknown to its operator")
            kwargs[key] = decode_argument(item, nodes, tokens, f"{where}: {key}")
    if callable(target) and not isinstance(target, torch._ops.OpOverload):
        _check_python_call(target, args, where)
    return args, kwargs


def _check_python_call(target: Callable[..., Any], args: tuple[Any, ...], where: str) -> None:
    """Python functions stand in generated code as expressions, which must be sound before they meet any value."""
    try:
        inspect.signature(target).bind(*args)
    except TypeError as error:
        refuse(where, str(error))
    if target is operator.getitem:
        fits = isinstance(args[0], fx.Node) and type(args[1]) is int
    else:
        fits = all(isinstance(item, (fx.Node, bool, int, float)) for item in args)
    if not fits:
        refuse(where, f"{target.__name__} is for sizes and results only")


def _is_output(args: tuple[Any, ...]) -> bool:
    return (
        len(args) == 1
        and isinstance(args[0], tuple)
        and len(args[0]) > 0
        and all(isinstance(item, fx.Node) for item in args[0])
    )
