"""Every backend with kernels of its own, and one operator lowered to it as a function of tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from contract_cases import Operands
from qdiff_fx.config import QDiffConfig
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.kernels import BACKENDS, x86
from qdiff_fx.kernels.x86_native import AVX2, VNNI, load_kernels
from qdiff_fx.passes.base import PassContext, run_passes
from qdiff_fx.passes.lower import LOWER

qdiff = torch.ops.qdiff

Build = Callable[[fx.Graph, nn.Module, list[fx.Node]], fx.Node]

X86_KERNELS = {"vnni": VNNI, "avx2": AVX2, "onednn": None}
KERNELS = [name for name in BACKENDS if name not in ("reference", "x86")] + [f"x86 {name}" for name in X86_KERNELS]

SLOW = {"cuda": "interpreted", "openvino": "compiled by a compiler of its own, a third of a second a layer"}
ZERO_POINTS = [
    # In both a zero point is nothing but a factor of a table.
    pytest.param(name, zero_point, marks=[pytest.mark.slow] if name in SLOW and zero_point != 3 else [])
    for name in KERNELS
    for zero_point in (0, 3, 255)
]

SATURATING_LAST = 128
"""Kernels that add pairs of products in 16 bits are right up to this code: 2 * 128 * 127 < 2^15."""

_INTEGER = (qdiff.conv2d.default, qdiff.linear.default)

_FED_BY_FLOATS = ("openvino", "qdq")
"""Backends that read codes only from a quantize step, which becomes a part of the layer."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A backend as it is tried here.

    Args:
      name: in BACKENDS.
      last: the largest code that its kernels count right on this CPU.
    """

    name: str
    last: int = 255

    @property
    def device(self) -> str:
        """Where: in the interpreter on the CPU, unless TRITON_INTERPRET=0 asks for the GPU."""
        return "cuda" if self.name == "cuda" and os.environ["TRITON_INTERPRET"] == "0" else "cpu"


@cache
def _unavailable(name: str, device: str) -> str | None:
    """openvino compiles a model to tell."""
    return BACKENDS[name].unavailable(device)


def tried_backend(parameter: str, monkeypatch: pytest.MonkeyPatch) -> Tried:
    """What KERNELS calls `parameter`, whether this CPU would choose it or not; skips where it cannot run."""
    name, _, kernels = parameter.partition(" ")
    tried = Tried(name=name)
    reason = _unavailable(name, tried.device)
    if name == "openvino" and "saturate" in (reason or ""):
        return Tried(name=name, last=SATURATING_LAST)
    if reason is not None:
        assert os.environ["TRITON_INTERPRET"] != "0" or name != "cuda", reason
        pytest.skip(reason)
    if name == "x86":
        chosen = X86_KERNELS[kernels]
        if chosen is not None and not load_kernels(chosen):
            pytest.skip(f"the CPU has no {chosen.needs}")
        monkeypatch.setattr(x86, "native_kernels", lambda: chosen)
        if not x86.known_answers_hold():
            assert chosen is None
            return Tried(name=name, last=SATURATING_LAST)
    return tried


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A lowered graph as a function of tensors on the CPU."""

    module: fx.GraphModule
    device: str

    @property
    def targets(self) -> list[str]:
        return [str(node.target) for node in self.module.graph.nodes]

    def __call__(self, *inputs: Tensor) -> Tensor:
        result: Tensor = self.module(*[item.to(self.device) for item in inputs])
        return result.cpu()


def lowered(tried: Tried, inputs: Sequence[Tensor], build: Build, *, strict: bool = False) -> Lowered:
    """A graph lowered to a backend.

    Args:
      inputs: examples of the placeholders.
      build: adds nodes to the graph and their constants to the module, and returns the output.
      strict: as for `convert`.
    """
    graph, root = fx.Graph(), nn.Module()
    names = tuple(f"x{index}" for index in range(len(inputs)))
    graph.output(build(graph, root, [graph.placeholder(name) for name in names]))
    module = fx.GraphModule(root, graph)
    _Values(module).run(*inputs)
    has_integers = any(node.target in _INTEGER for node in graph.nodes)
    module.to(tried.device)
    signature = CallSignature(inputs=(), parameters=names, structure={}, sample=names[0], timestep=None)
    run_passes(LOWER[tried.name], module, PassContext(config=QDiffConfig(), signature=signature, strict=strict))
    if tried.name == "openvino" and has_integers:
        _hold_to_integers(module)
    return Lowered(module=module, device=tried.device)


class _Values(fx.Interpreter):
    """Leaves every node's value where passes look for it."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = result
        return result


def _hold_to_integers(module: fx.GraphModule) -> None:
    """Every convolution and linear of the compiled model reads bytes; asked without the backend's own code."""
    program: Any = module.openvino_program
    for node in program.compiled.get_runtime_model().get_ordered_ops():
        info = {key: value.astype(str) for key, value in node.get_rt_info().items() if key in _KEYS}
        if info["layerType"] in ("Convolution", "FullyConnected", "MatMul"):
            assert info["runtimePrecision"] in ("u8", "i8"), info


_KEYS = ("layerType", "runtimePrecision")


def operator(
    tried: Tried, target: Any, operands: Operands, tail: tuple[Any, ...], zero_point: int
) -> Callable[[Tensor], Tensor]:
    """One integer layer, lowered, as a function of the activation codes."""
    fed_by_floats = tried.name in _FED_BY_FLOATS
    axis = 1 if target is qdiff.conv2d.default else operands.x.ndim - 1

    def real(codes: Tensor) -> Tensor:
        return (codes.float() - zero_point) * operands.x_scale

    def build(graph: fx.Graph, root: nn.Module, given: list[fx.Node]) -> fx.Node:
        x = given[0]
        if fed_by_floats:
            root.register_buffer("inv_scale", torch.tensor(1 / operands.x_scale))
            x = graph.call_function(qdiff.quantize.default, (x, graph.get_attr("inv_scale"), zero_point, 0, 255, axis))
        return integer_layer(graph, root, x, target, operands, zero_point, tail)

    run = lowered(tried, [real(operands.x) if fed_by_floats else operands.x], build)
    assert str(target) not in run.targets, "the backend left the operator to the reference"
    return (lambda codes: run(real(codes))) if fed_by_floats else run


def integer_layer(
    graph: fx.Graph,
    root: nn.Module,
    x: fx.Node,
    target: Any,
    operands: Operands,
    zero_point: int,
    tail: tuple[Any, ...],
) -> fx.Node:
    """A call of `target` on codes `x` at the end of the graph, its constants in `root`."""
    constants: list[fx.Node | None] = []
    for name in ("weight", "scale", "zero_point", "shift", "bias"):
        tensor = operands[name]
        if tensor is not None:
            root.register_buffer(name, tensor)
        constants.append(None if tensor is None else graph.get_attr(name))
    return graph.call_function(target, (x, *constants, operands.x_scale, zero_point, *tail))
