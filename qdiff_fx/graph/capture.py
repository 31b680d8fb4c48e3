"""Capture a module as a plain torch.fx GraphModule of ATen operators."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from qdiff_fx.errors import CaptureError
from qdiff_fx.graph.downsampling import largest_downsampling
from qdiff_fx.graph.meta import MODULE_PATH
from qdiff_fx.graph.outputs import OutputStructure, flatten_output
from qdiff_fx.graph.signature import CallSignature, derive_signature
from qdiff_fx.graph.tokens import mark_fixed_dtypes

_WRAPPED = "module"


@dataclass(frozen=True, kw_only=True)
class CapturedGraph:
    """A module as a graph, with what is needed to call the one like the other.

    The graph shares its parameters with the module; it is never deep-copied.
    """

    graph_module: fx.GraphModule
    signature: CallSignature
    output: OutputStructure


class _FlatCall(nn.Module):
    """The module behind flat tensor inputs and outputs."""

    def __init__(
        self,
        module: nn.Module,
        signature: CallSignature,
        forced: Mapping[str, Any],
        on_output: Callable[[OutputStructure], None],
    ) -> None:
        super().__init__()
        self.module = module
        self.signature = signature
        self.forced = dict(forced)
        self.on_output = on_output  # torch.export reverts attribute writes, a callback survives

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        result = self.module(**self.signature.unflatten(inputs), **self.forced)
        output, tensors = flatten_output(result)
        self.on_output(output)
        return tensors


def capture(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    sample_input: str | None = None,
    forced: Mapping[str, Any] | None = None,
) -> CapturedGraph:
    """`module` as a GraphModule of ATen operators with dynamic batch, height, width and context length.

    Bit-equal to the module in eval mode. Uses non-strict torch.export on fake tensors, so it computes nothing.

    Args:
      args, kwargs: an example call; the batch must be 2 or more (1 would be taken as a constant).
      sample_input: name of the input that holds the noisy sample; None takes the first 4-D one.
      forced: arguments that every call gets (`return_dict=False`).
    Raises: CaptureError with the reason when the module's Python cannot be traced.
    """
    signature, values = derive_signature(module, args, kwargs or {}, sample_input=sample_input)
    batch = signature.input(signature.sample).shape[0]
    if batch is not None and batch < 2:
        raise CaptureError(
            f"example {signature.sample} has batch {batch}; want 2 or more, so that the batch stays dynamic"
        )
    if module.training:
        raise CaptureError(f"{type(module).__name__} is in training mode; call .eval() on it first")
    outputs: list[OutputStructure] = []
    wrapper = _FlatCall(module, signature, forced or {}, outputs.append).eval()
    dynamic = tuple(_dynamic_dimensions(tuple(value.shape), batch) for value in values)
    try:
        with torch.no_grad(), _unmoved(module):
            program = torch.export.export(wrapper, values, dynamic_shapes=(dynamic,), strict=False)
    except Exception as error:  # torch.export raises many unrelated types; the reason is kept and chained
        reason = next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(f"{_failing_module(module, error)}: torch.export cannot capture it: {reason}") from error
    exported = program.module(check_guards=False)
    assert isinstance(exported, fx.GraphModule)
    graph_module = _rebuild(exported, signature, type(module).__name__)
    mark_fixed_dtypes(graph_module.graph, signature.timestep)
    signature = _with_dynamic_shapes(graph_module, signature)
    return CapturedGraph(graph_module=graph_module, signature=signature, output=outputs[-1])


@contextmanager
def _unmoved(module: nn.Module) -> Iterator[None]:
    """`.to()` and `.cpu()` do nothing inside the block: offloading hooks would move what are fake tensors there."""
    children = list(module.modules())
    own: list[dict[str, Any]] = [
        {name: child.__dict__[name] for name in ("to", "cpu") if name in child.__dict__} for child in children
    ]
    for child in children:
        child.__dict__["to"] = child.__dict__["cpu"] = partial(_itself, child)
    try:
        yield
    finally:
        for child, before in zip(children, own, strict=True):
            del child.__dict__["to"], child.__dict__["cpu"]
            child.__dict__.update(before)


def _itself(module: nn.Module, *_args: Any, **_options: Any) -> nn.Module:
    return module


def _dynamic_dimensions(shape: tuple[int, ...], batch: int | None) -> dict[int, Any]:
    """Batch, the spatial dimensions of images and the length of sequences; export settles the rest."""
    dynamic: dict[int, Any] = {0: torch.export.Dim.DYNAMIC} if shape and shape[0] == batch else {}
    if len(shape) == 4:
        dynamic |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    if len(shape) == 3:
        dynamic |= {1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    return dynamic


def _rebuild(exported: fx.GraphModule, signature: CallSignature, name: str) -> fx.GraphModule:
    """A plain GraphModule (the exported one refuses `.eval()`), parameters shared, names as in the original."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    tensors: dict[str, Tensor] = {}
    flat_names = iter(signature.names)
    # Inputs first: export lists the weights before them, and what passes put behind a weight would precede an input.
    for node in sorted(exported.graph.nodes, key=lambda node: node.op != "placeholder"):
        if node.op == "placeholder":
            copy = graph.placeholder(next(flat_names))
            copy.meta = dict(node.meta)
        elif node.op == "output":
            outputs = torch.fx.map_arg(node.args[0], lambda item: values[item])
            graph.output(tuple(pytree.tree_leaves(outputs)))
            break
        else:
            copy = graph.node_copy(node, lambda item: values[item])
            if node.op == "get_attr":
                target = str(node.target)
                copy.target = target.removeprefix(f"{_WRAPPED}.")
                tensors[str(copy.target)] = _attribute(exported, target)
            elif node.op != "call_function":
                raise CaptureError(f"{node.name}: torch.export left a {node.op} node; only ATen calls are supported")
        MODULE_PATH.set(copy, _module_path(node))
        values[node] = copy
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(tensors, graph, class_name=name)


def _attribute(root: nn.Module, path: str) -> Tensor:
    value = operator.attrgetter(path)(root)
    if not isinstance(value, Tensor):
        raise CaptureError(
            f"{path}: the graph holds a {type(value).__name__}; data-dependent control flow is unsupported"
        )
    return value


def _module_path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    return "" if path == _WRAPPED else path.removeprefix(f"{_WRAPPED}.")


def _with_dynamic_shapes(graph_module: fx.GraphModule, signature: CallSignature) -> CallSignature:
    """The signature with None where the captured graph takes any size."""
    shapes = {node.name: node.meta["val"].shape for node in graph_module.graph.nodes if node.op == "placeholder"}
    batch = next(iter(shapes[signature.sample]), None)
    inputs = tuple(
        replace(
            item,
            shape=tuple(None if free_symbols(size) else int(size) for size in shapes[item.name]),
            # By name: to ask two dynamic sizes whether they are equal would make them so.
            batched=bool(shapes[item.name]) and bool(free_symbols(batch)) and str(shapes[item.name][0]) == str(batch),
        )
        for item in signature.inputs
    )
    return replace(signature, inputs=inputs, size_multiple=largest_downsampling(graph_module.graph, signature.sample))


def _failing_module(module: nn.Module, error: BaseException) -> str:
    """Path of the innermost submodule whose forward is on the traceback."""
    paths = {id(child): path for path, child in module.named_modules()}
    best = type(module).__name__
    traceback = error.__traceback__
    while traceback is not None:
        path = paths.get(id(traceback.tb_frame.f_locals.get("self")))
        if path:
            best = path
        traceback = traceback.tb_next
    return best
