"""Fake values for a graph that was not captured here: shapes and dtypes of every node, no arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from qdiff_fx.errors import CheckpointError
from qdiff_fx.graph.allowlist import GETITEM, SIZE_ARITHMETIC, target_name
from qdiff_fx.graph.edit import get_tensor
from qdiff_fx.graph.signature import CallSignature

Dimension = int | str
"""A size, or the name of a symbol: dimensions with one symbol are equal in every call."""

SMALLEST_DYNAMIC = 2
"""Compilers take 0 and 1 for constants."""

_MAXIMUM_ELEMENTS = 2**48
_MAXIMUM_RESULTS = 4096
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


class FakeInputs:
    """Fake tensors whose dynamic dimensions are fresh symbols.

    Args:
      hints: the size that each symbol had in a call, 2 or more; guards are decided by it.
    """

    def __init__(self, hints: Mapping[str, int]) -> None:
        environment = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=environment)
        self._sizes: dict[str, Any] = {}
        for name, hint in hints.items():
            source = ConstantSource(name)
            symbol = environment.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
            self._sizes[name] = environment.create_symintnode(symbol, hint=hint, source=source)

    def tensor(self, shape: Sequence[Dimension], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous fake tensor."""
        sizes = [self._sizes[size] if isinstance(size, str) else size for size in shape]
        with self.mode:
            return torch.empty(sizes, dtype=dtype, device=device)


def propagate(graph_module: fx.GraphModule, mode: FakeTensorMode, inputs: Mapping[str, Tensor], where: str) -> None:
    """Set `node.meta["val"]` on every node.

    Args:
      inputs: a fake tensor of `mode` for each placeholder.
      where: the file, for errors.

    Raises: CheckpointError naming the node whose operator refuses its arguments.
    """
    values: dict[fx.Node, Any] = {}
    # Without the Python dispatcher, operators that C++ decomposes (upsampling) take symbolic sizes for constants.
    with mode, enable_python_dispatcher(), torch.no_grad():
        for node in graph_module.graph.nodes:
            if node.op == "placeholder":
                value: Any = inputs[node.name]
            elif node.op == "get_attr":
                value = mode.from_tensor(get_tensor(graph_module, node.target), static_shapes=True)
            elif node.op == "call_function":
                value = _call(node, values, f"{where}: node {node.name}")
            else:
                continue
            node.meta["val"] = values[node] = value


def refresh(
    graph_module: fx.GraphModule, signature: CallSignature, shapes: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Give every node the fake value that it has with the signature's dtypes and, as its hint, the size of `shapes`.

    Args:
      shapes: by input, with or without the batch dimension; other dimensions keep their hints.
    """
    names: dict[str, str] = {}
    hints: dict[str, int] = {}
    inputs: dict[str, tuple[list[Dimension], torch.device]] = {}
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            continue
        value: Tensor = node.meta["val"]
        given = (shapes or {}).get(node.name, ())
        known = [size_hint(size) for size in value.shape[: value.dim() - len(given)]] + list(given)
        inputs[node.name] = [], value.device
        for size, hint in zip(value.shape, known, strict=True):
            if isinstance(size, int):
                inputs[node.name][0].append(size)
                continue
            symbol = names.setdefault(str(size), f"d{len(names)}")
            hints[symbol] = max(SMALLEST_DYNAMIC, hint)
            inputs[node.name][0].append(symbol)
    fakes = FakeInputs(hints)
    values = {
        name: fakes.tensor(shape, signature.input(name).dtype, device) for name, (shape, device) in inputs.items()
    }
    propagate(graph_module, fakes.mode, values, "the converted graph")


def size_hint(size: Any) -> int:
    """A size as it was in calibration; before that, and for what was not calibrated, as in the example call."""
    return int(size) if isinstance(size, int) else int(size.node.hint)


def example_inputs(graph_module: fx.GraphModule, *, least: int = 0) -> tuple[Tensor, ...]:
    """Ones of the inputs' sizes by `size_hint`, and of their dtypes; sizes that may vary are at least `least`."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            value: Tensor = node.meta["val"]
            sizes = [size if isinstance(size, int) else max(least, size_hint(size)) for size in value.shape]
            found.append(torch.ones(sizes, dtype=value.dtype))
    return tuple(found)


def _call(node: fx.Node, values: Mapping[fx.Node, Any], where: str) -> Any:
    args = fx.node.map_arg(node.args, lambda item: values[item])
    kwargs = fx.node.map_arg(node.kwargs, lambda item: values[item])
    target: Any = node.target
    name = target_name(target)
    _check_python_call(name, args, kwargs, where)
    try:
        value = target(*args, **kwargs)
    except Exception as error:  # operators raise many types for arguments that do not fit
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{where}: {name} refuses its arguments: {reason:.200}; edited or damaged, save the model again"
        ) from error
    _check_size(value, where)
    return value


def _check_python_call(name: str | None, args: Any, kwargs: Any, where: str) -> None:
    """Python functions get numbers only: on a list, `mul` would fill the memory."""
    fits = True
    if name in SIZE_ARITHMETIC:
        fits = not kwargs and all(isinstance(item, _NUMBERS) for item in args)
    elif name == GETITEM:
        fits = not kwargs and len(args) == 2 and isinstance(args[0], (list, tuple)) and type(args[1]) is int
    if not fits:
        raise CheckpointError(f"{where}: {name} is for sizes and results only; edited or damaged, save the model again")


def _check_size(value: Any, where: str) -> None:
    if isinstance(value, (list, tuple)):
        if len(value) > _MAXIMUM_RESULTS:
            raise CheckpointError(f"{where}: {len(value)} results, want at most {_MAXIMUM_RESULTS}")
        for item in value:
            _check_size(item, where)
    elif isinstance(value, Tensor):
        if any(not isinstance(size, int) and size.node.hint is None for size in value.shape):
            raise CheckpointError(f"{where}: its size depends on data; edited or damaged, save the model again")
        elements = math.prod(size_hint(size) for size in value.shape)
        if elements > _MAXIMUM_ELEMENTS:
            raise CheckpointError(f"{where}: {elements} elements; edited or damaged, save the model again")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise CheckpointError(f"{where}: a size of more than 64 bits; edited or damaged, save the model again")
