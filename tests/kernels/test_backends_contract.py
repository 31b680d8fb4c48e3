"""Every backend computes what the reference defines: the same accumulators, and outputs within float32 rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qdiff_fx.config import QDiffConfig
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.kernels import BACKENDS, reference, x86
from qdiff_fx.kernels.machine import instruction_sets
from qdiff_fx.kernels.x86_native import AVX2, VNNI, load_kernels, native_kernels
from qdiff_fx.numerics.packing import pack_int4, pack_shifts
from qdiff_fx.passes.base import PassContext, run_passes
from qdiff_fx.passes.lower import LOWER

qdiff = torch.ops.qdiff

EXACT = 2**24
"""Below this magnitude every integer is a float32."""


@dataclass(frozen=True, kw_only=True)
class Conv:
    batch: int = 2
    channels: int = 16
    outputs: int = 16
    size: tuple[int, int] = (8, 8)
    kernel: tuple[int, int] = (3, 3)
    stride: list[int] = field(default_factory=lambda: [1, 1])
    padding: list[int] = field(default_factory=lambda: [1, 1])
    dilation: list[int] = field(default_factory=lambda: [1, 1])
    groups: int = 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.outputs, self.channels // self.groups, *self.kernel)


CONVS = {
    "3x3": Conv(),
    "1x1": Conv(kernel=(1, 1), padding=[0, 0]),
    "1x1-stride2": Conv(kernel=(1, 1), padding=[0, 0], stride=[2, 2]),
    "3x3-stride2": Conv(stride=[2, 2]),
    "no-padding": Conv(padding=[0, 0]),
    "dilated": Conv(padding=[2, 2], dilation=[2, 2]),
    "groups": Conv(groups=4),
    "depthwise": Conv(groups=16),
    "odd-size": Conv(size=(7, 5)),
    "odd-channels": Conv(channels=5, outputs=7),
    "96-channels": Conv(channels=96, outputs=96, size=(7, 7)),
    "one-channel": Conv(channels=1, outputs=3),
    "as-conv1d": Conv(size=(1, 9), kernel=(1, 3), padding=[0, 1]),
    "batch1": Conv(batch=1),
    "batch3-stride2-odd": Conv(batch=3, channels=24, outputs=40, size=(9, 11), stride=[2, 2]),
    "batch4-padding-by-axis": Conv(batch=4, channels=12, outputs=20, size=(6, 9), kernel=(3, 5), padding=[0, 2]),
    "batch5": Conv(batch=5, channels=33, outputs=31),
    "empty-batch": Conv(batch=0),
}

LINEARS = {
    "plain": ((4, 16), 32),
    "sequence": ((2, 7, 16), 32),
    "four-dimensional": ((2, 3, 4, 16), 8),
    "odd": ((3, 17), 33),
    "one-feature": ((5, 16), 1),
    "320": ((2, 9, 320), 320),
    "empty": ((0, 16), 8),
    "empty-sequence": ((2, 0, 16), 8),
    "empty-batch": ((0, 7, 16), 8),
}

STORED = ("int8", "int4", "int4-shifted")


X86_KERNELS = {"vnni": VNNI, "avx2": AVX2, "onednn": None}
# The q/dq form has no integer kernels, hence no accumulators: tests/passes/lower/test_qdq.py holds its numbers.
KERNELS = [name for name in BACKENDS if name not in ("reference", "qdq", "x86")] + [
    f"x86 {name}" for name in X86_KERNELS
]

ZERO_POINTS = [
    # In the cuda kernels a zero point is nothing but a factor of a table; interpreting all three takes half a minute.
    pytest.param(name, zero_point, marks=[pytest.mark.slow] if name == "cuda" and zero_point != 3 else [])
    for name in KERNELS
    for zero_point in (0, 3, 255)
]


def device_of(backend: str) -> str:
    """Where a backend is tried: in the interpreter on the CPU, unless TRITON_INTERPRET=0 asks for the GPU."""
    return "cuda" if backend == "cuda" and os.environ["TRITON_INTERPRET"] == "0" else "cpu"


@pytest.fixture(params=KERNELS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, kernels = request.param.partition(" ")
    reason = BACKENDS[name].unavailable(device_of(name))
    if reason is not None:
        assert os.environ["TRITON_INTERPRET"] != "0" or name != "cuda", reason
        pytest.skip(reason)
    if name == "x86":  # whether this CPU would choose them or not
        chosen = X86_KERNELS[kernels]
        if chosen is not None and not load_kernels(chosen):
            pytest.skip(f"the CPU has no {chosen.needs}")
        monkeypatch.setattr(x86, "native_kernels", lambda: chosen)
        if not x86.known_answers_hold():
            assert chosen is None
            pytest.skip("oneDNN's kernels saturate on this CPU")
    return name


def on_device(module: fx.GraphModule, backend: str) -> Callable[[Tensor], Tensor]:
    """The lowered module as a function of tensors on the CPU."""
    return lambda x: module(x.to(device_of(backend))).cpu()


class Operands:
    """Random codes and weights in one stored form; scales of 1 unless `scaled`."""

    def __init__(
        self, input_shape: tuple[int, ...], weight_shape: tuple[int, ...], stored: str, *, groups: int = 1, scaled: bool
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        outputs = weight_shape[0]
        codes = {"dtype": torch.uint8, "generator": generator}
        self.x = torch.randint(0, 256, input_shape, **codes)
        self.tensors: dict[str, Tensor | None] = dict.fromkeys(("zero_point", "shift", "bias"))
        if stored == "int8":
            weight = torch.randint(-127, 128, weight_shape, dtype=torch.int8, generator=generator)
        else:
            weight = pack_int4(torch.randint(0, 16, weight_shape, **codes))
            self.tensors["zero_point"] = torch.randint(0, 16, (outputs,), **codes)
            if stored == "int4-shifted":
                channels = weight_shape[1] * groups
                self.tensors["shift"] = pack_shifts(torch.randint(0, 4, (channels,), **codes))
        scale = torch.rand(outputs, generator=generator) + 0.5 if scaled else torch.ones(outputs)
        self.tensors |= {"weight": weight, "scale": scale}
        if scaled:
            self.tensors["bias"] = 1000 * torch.randn(outputs, generator=generator)
        self.x_scale = 0.37 if scaled else 1.0

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]


def operator(backend: str, target: Any, operands: Operands, tail: tuple[Any, ...], zero_point: int) -> Any:
    """A graph of one integer layer, lowered to `backend`, as a function of the activation codes."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    root = nn.Module()
    nodes: dict[str, fx.Node | None] = {}
    for name in ("weight", "scale", "zero_point", "shift", "bias"):
        tensor = operands[name]
        nodes[name] = None
        if tensor is not None:
            root.register_buffer(name, tensor)
            nodes[name] = graph.get_attr(name)
    order = (nodes["weight"], nodes["scale"], nodes["zero_point"], nodes["shift"], nodes["bias"])
    node = graph.call_function(target, (x, *order, operands.x_scale, zero_point, *tail))
    graph.output(node)
    constants = [operands[name] for name in ("weight", "scale", "zero_point", "shift", "bias")]
    x.meta["val"] = operands.x
    node.meta["val"] = target(operands.x, *constants, operands.x_scale, zero_point, *tail)
    module = fx.GraphModule(root.to(device_of(backend)), graph)
    signature = CallSignature(inputs=(), parameters=("x",), structure={}, sample="x", timestep=None)
    run_passes(LOWER[backend], module, PassContext(config=QDiffConfig(), signature=signature))
    names = [str(item.target) for item in module.graph.nodes]
    assert str(target) not in names, "the backend left the operator to the reference"
    return on_device(module, backend)


def conv(case: Conv, stored: str, *, scaled: bool, dtype: torch.dtype) -> tuple[Operands, tuple[Any, ...]]:
    operands = Operands(case.input_shape, case.weight_shape, stored, groups=case.groups, scaled=scaled)
    tail = (list(case.weight_shape), case.stride, case.padding, case.dilation, case.groups, dtype)
    return operands, tail


def conv_accumulator(case: Conv, operands: Operands, zero_point: int) -> Tensor:
    weight = reference.integer_weight(
        operands["weight"], operands["zero_point"], operands["shift"], case.weight_shape, case.groups
    )
    return reference.conv2d_accumulator(
        operands.x, zero_point, weight, case.stride, case.padding, case.dilation, case.groups
    )


FLOAT_PARTS = ("openvino",)
"""Backends that add the zero point's share in float32: they round relative to the largest sum that codes can make."""


def largest_sum(backend: str, operands: Operands, shape: tuple[int, ...], groups: int = 1) -> Tensor | None:
    """255 sum |w|, [O], for backends that round relative to it, None for others."""
    if backend not in FLOAT_PARTS:
        return None
    weight = reference.integer_weight(operands["weight"], operands["zero_point"], operands["shift"], shape, groups)
    return 255.0 * weight.flatten(1).double().abs().sum(1)


def within_rounding(
    result: Tensor, accumulator: Tensor, operands: Operands, axis: int, largest: Tensor | None
) -> Tensor:
    """|result - exact| <= 1e-6 (|acc * scale| + |bias|): a few float32 roundings of 6e-8 each.

    Args:
      largest: [O], in place of |acc| where parts of it are added in float32.
    """
    shape = [1] * accumulator.ndim
    shape[axis] = -1
    scale = (operands["scale"].double() * operands.x_scale).view(shape)
    product = accumulator.double() * scale
    bias = operands["bias"].double().view(shape)
    size = product.abs() if largest is None else largest.view(shape) * scale
    return (result.double() - (product + bias)).abs() <= 1e-6 * (size + bias.abs())


@pytest.mark.parametrize(("backend", "zero_point"), ZERO_POINTS, indirect=["backend"])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("case", CONVS.values(), ids=CONVS.keys())
def test_convolutions_have_equal_accumulators(backend: str, case: Conv, stored: str, zero_point: int) -> None:
    operands, tail = conv(case, stored, scaled=False, dtype=torch.float32)
    accumulator = conv_accumulator(case, operands, zero_point)
    assert accumulator.numel() == 0 or int(accumulator.abs().max()) < EXACT
    result = operator(backend, qdiff.conv2d.default, operands, tail, zero_point)(operands.x)
    assert torch.equal(result, accumulator.float())
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("case", CONVS.values(), ids=CONVS.keys())
def test_convolution_outputs_agree_within_rounding(backend: str, case: Conv, stored: str) -> None:
    operands, tail = conv(case, stored, scaled=True, dtype=torch.float32)
    result = operator(backend, qdiff.conv2d.default, operands, tail, 7)(operands.x)
    largest = largest_sum(backend, operands, case.weight_shape, case.groups)
    assert within_rounding(result, conv_accumulator(case, operands, 7), operands, 1, largest).all()


@pytest.mark.parametrize(("backend", "zero_point"), ZERO_POINTS, indirect=["backend"])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("shape", "outputs"), LINEARS.values(), ids=LINEARS.keys())
def test_linears_have_equal_accumulators(
    backend: str, shape: tuple[int, ...], outputs: int, stored: str, zero_point: int
) -> None:
    operands = Operands(shape, (outputs, shape[-1]), stored, scaled=False)
    weight = reference.integer_weight(
        operands["weight"], operands["zero_point"], operands["shift"], (outputs, shape[-1]), 1
    )
    accumulator = reference.linear_accumulator(operands.x, zero_point, weight)
    assert accumulator.numel() == 0 or int(accumulator.abs().max()) < EXACT
    tail = ([outputs, shape[-1]], torch.float32)
    result = operator(backend, qdiff.linear.default, operands, tail, zero_point)(operands.x)
    assert torch.equal(result, accumulator.float())


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("shape", "outputs"), LINEARS.values(), ids=LINEARS.keys())
def test_linear_outputs_agree_within_rounding(backend: str, shape: tuple[int, ...], outputs: int, stored: str) -> None:
    operands = Operands(shape, (outputs, shape[-1]), stored, scaled=True)
    weight = reference.integer_weight(
        operands["weight"], operands["zero_point"], operands["shift"], (outputs, shape[-1]), 1
    )
    tail = ([outputs, shape[-1]], torch.float32)
    result = operator(backend, qdiff.linear.default, operands, tail, 7)(operands.x)
    accumulator = reference.linear_accumulator(operands.x, 7, weight)
    largest = largest_sum(backend, operands, (outputs, shape[-1]))
    assert within_rounding(result, accumulator, operands, -1, largest).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_outputs_are_the_rounded_float32_ones(backend: str, dtype: torch.dtype) -> None:
    case = CONVS["3x3"]
    operands, tail = conv(case, "int8", scaled=False, dtype=torch.float32)
    operands.x = operands.x % 4  # accumulators below 2^16, so that float16 stays finite
    exact = operator(backend, qdiff.conv2d.default, operands, tail, 0)(operands.x)
    narrow = operator(backend, qdiff.conv2d.default, operands, (*tail[:-1], dtype), 0)(operands.x)
    assert narrow.dtype == dtype
    assert torch.equal(narrow, exact.to(dtype))


def test_a_contiguous_input_gives_the_same_as_a_channels_last_one(backend: str) -> None:
    operands, tail = conv(CONVS["odd-size"], "int8", scaled=False, dtype=torch.float32)
    run = operator(backend, qdiff.conv2d.default, operands, tail, 9)
    assert torch.equal(run(operands.x.contiguous()), run(operands.x.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize(
    ("shape", "vector", "axis"),
    [((2, 6, 5, 4), False, 1), ((2, 6, 5, 4), True, 1), ((2, 3, 6), True, 2), ((2, 3, 5, 6), True, 3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_equal_to_the_bit(
    backend: str, shape: tuple[int, ...], vector: bool, axis: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(shape, generator=generator)
    values.view(-1)[:4] = torch.tensor([torch.inf, -torch.inf, 0.25, -0.25])
    x = values.to(dtype)
    inv_scale = torch.rand(shape[axis], generator=generator) * 40 + 1 if vector else torch.tensor(14.0)
    graph = fx.Graph()
    placeholder = graph.placeholder("x")
    root = nn.Module()
    root.register_buffer("inv_scale", inv_scale)
    attribute = graph.get_attr("inv_scale")
    arguments = (120, 0, 255, axis)
    node = graph.call_function(qdiff.quantize.default, (placeholder, attribute, *arguments))
    graph.output(node)
    wanted = qdiff.quantize.default(x, inv_scale, *arguments)
    placeholder.meta["val"], attribute.meta["val"], node.meta["val"] = x, inv_scale, wanted
    module = fx.GraphModule(root.to(device_of(backend)), graph)
    signature = CallSignature(inputs=(), parameters=("x",), structure={}, sample="x", timestep=None)
    run_passes(LOWER[backend], module, PassContext(config=QDiffConfig(), signature=signature))
    result = on_device(module, backend)(x)
    assert torch.equal(result, wanted)
    if backend in ("x86", "cuda"):  # channels are neighbours, as their kernels read them
        assert result.is_contiguous(memory_format=torch.channels_last if axis == 1 else torch.contiguous_format)


_PROBE = """
from qdiff_fx.errors import BackendError
from qdiff_fx.kernels import select_backend
print(select_backend("auto", "cpu").name)
try:
    print(select_backend("x86", "cpu").name)
except BackendError as error:
    print(error)
"""


def _probed(isa: str, **variables: str) -> list[str]:
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "PYTHONWARNINGS": "ignore"} | variables
    done = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-2:]


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_a_cpu_whose_kernels_saturate_is_refused(isa: str) -> None:
    """Where ours cannot be compiled auto falls to the reference; who asks for x86 hears why and the two ways out."""
    chosen, refusal = _probed(isa, CXX="no-such-compiler")
    assert chosen == "reference"
    assert "cannot run here" in refusal and "'reference'" in refusal and "bf16" in refusal
    assert "saturate" in refusal or "x86_64" in refusal or "oneDNN" in refusal


@pytest.mark.skipif(native_kernels() is None, reason="no kernels of our own here")
def test_kernels_of_our_own_are_right_where_onednn_saturates() -> None:
    assert _probed("AVX2") == ["x86", "x86"]


@pytest.mark.skipif("avx512_vnni" not in instruction_sets(), reason="the CPU has no AVX512-VNNI")
def test_for_onednn_vnni_without_anything_newer_is_enough() -> None:
    assert _probed("AVX512_CORE_VNNI", CXX="no-such-compiler") == ["x86", "x86"]


def test_x86_runs_on_cpus_only() -> None:
    assert "cuda" in (BACKENDS["x86"].unavailable("cuda") or "")
