"""Our own operators for x86: exact sums in every layout, faults refused, and oneDNN's where they cannot be had."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qdiff_fx.errors import QDiffWarning, QuantSpecError
from qdiff_fx.kernels import reference, x86, x86_native
from qdiff_fx.kernels.x86 import KernelCall, conv2d_call, linear_call
from qdiff_fx.kernels.x86_native import AVX2, VNNI, NativeKernels, load_kernels, native_kernels
from subjects import codes


@pytest.fixture(params=[VNNI, AVX2], ids=lambda kernels: kernels.name)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NativeKernels:
    """Whether this CPU would choose them or not."""
    found: NativeKernels = request.param
    if not load_kernels(found):
        pytest.skip(f"the CPU has no {found.needs}")
    monkeypatch.setattr(x86, "native_kernels", lambda: found)
    return found


def chosen() -> NativeKernels:
    """What the fixture chose, for tests of many examples, which may not take it as an argument."""
    found = x86.native_kernels()
    assert found is not None
    return found


def weights(*shape: int) -> Tensor:
    """Some channels small as those of 4 bits, some with their shifts, some of all 8 bits, in runs of eight."""
    largest = torch.tensor([7, 15, 15, 120, 127])[torch.randint(5, (-(-shape[1] // 8),))].repeat_interleave(8)[
        : shape[1]
    ]
    values = torch.randint(-127, 128, shape).float() / 127 * largest.view(-1, *[1] * (len(shape) - 2))
    return values.round().to(torch.int8)


@pytest.mark.usefixtures("kernels")
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 36),
    outputs=st.integers(1, 70),
    groups=st.integers(1, 3),
    height=st.integers(5, 12),
    width=st.integers(5, 12),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    zero_point=st.integers(0, 255),
)
def test_sums_of_convolutions_are_exact(
    batch: int,
    channels: int,
    outputs: int,
    groups: int,
    height: int,
    width: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    zero_point: int,
) -> None:
    x, weight = codes(batch, groups * channels, height, width), weights(groups * outputs, channels, *kernel)
    geometry = (list(stride), list(padding), list(dilation), groups)
    call = conv2d_call(weight, torch.ones(groups * outputs), None, 1.0, zero_point, geometry, None, torch.float32)
    assert call.target is chosen().operator("conv2d")
    wanted = functional.conv2d(x.double() - zero_point, weight.double(), None, stride, padding, dilation, groups)
    result = call(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(result.double(), wanted.float().double())  # |sums| may pass 2^24, where float32 rounds
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("threads", [1, 2])
def test_views_and_threads_change_nothing(kernels: NativeKernels, threads: int) -> None:
    """A slice of channels, an image of plain strides, a transposed sequence; more rows than one thread's share."""
    wide = codes(2, 96, 60, 250).contiguous(memory_format=torch.channels_last)
    weight = weights(64, 64, 3, 3)
    for padding in ([0, 0], [1, 1]):
        call = conv2d_call(
            weight, torch.ones(64), torch.ones(64), 1.0, 5, ([1, 1], padding, [1, 1], 1), None, torch.float32
        )
        part = wide[:, 16:80]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results = [call(part), call(part.contiguous()), call(part.clone(memory_format=torch.channels_last))]
        finally:
            torch.set_num_threads(before)
        wanted = functional.conv2d(part.double() - 5, weight.double(), None, padding=padding) + 1
        for result in results:
            assert torch.equal(result.double(), wanted.float().double())
    few = codes(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)[:, 1:4]
    matrix = weights(8, 3, 1, 1)
    call = conv2d_call(matrix, torch.ones(8), None, 1.0, 5, ([1, 1], [0, 0], [1, 1], 1), None, torch.float32)
    assert torch.equal(call(few).double(), functional.conv2d(few.double() - 5, matrix.double()))
    tokens = codes(2, 32, 9).transpose(1, 2)
    matrix = weights(40, 32)
    call = linear_call(matrix, torch.ones(40), None, 1.0, 9, torch.float32)
    assert call.target is kernels.operator("linear")
    assert torch.equal(call(tokens).double(), (tokens.double() - 9) @ matrix.double().T)


@pytest.mark.usefixtures("kernels")
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 30), features=st.integers(1, 70), outputs=st.integers(1, 70), zero_point=st.integers(0, 255))
def test_sums_of_linears_are_exact(rows: int, features: int, outputs: int, zero_point: int) -> None:
    x, weight = codes(rows, features), weights(outputs, features)
    call = linear_call(weight, torch.ones(outputs), None, 1.0, zero_point, torch.float32)
    assert call.target is chosen().operator("linear")
    assert torch.equal(call(x).double(), (x.double() - zero_point) @ weight.double().T)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_have_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    x, weight, scale, bias = codes(3, 24, 9, 7), weights(40, 24, 3, 3), torch.rand(40), 100 * torch.randn(40)
    geometry = ([2, 1], [1, 1], [1, 1], 1)
    result = conv2d_call(weight, scale, bias, 0.37, 3, geometry, None, dtype)(x)
    sums = reference.conv2d_accumulator(x, 3, weight, *geometry)
    assert torch.equal(result, reference.rescale(sums, 0.37, scale, bias, 1, dtype))
    rows, matrix = codes(50, 24), weights(40, 24)
    result = linear_call(matrix, scale, None, 0.37, 3, dtype)(rows)
    sums = reference.linear_accumulator(rows, 3, matrix)
    assert torch.equal(result, reference.rescale(sums, 0.37, scale, None, 1, dtype))


def test_every_way_to_bfloat16_rounds_to_nearest_even(kernels: NativeKernels) -> None:
    call = linear_call(
        torch.ones(33, 4, dtype=torch.int8), torch.rand(33) - 0.5, torch.randn(33), 0.37, 3, torch.bfloat16
    )
    x = codes(40, 4)
    exact = KernelCall(target=call.target, tensors=call.tensors, literals=(33, torch.float32))(x)
    assert torch.equal(call(x), exact.to(torch.bfloat16))
    if kernels is VNNI:
        choose = ctypes.CDLL(str(kernels.library())).qdiff_use_bfloat16_instruction
        for used in (False, True):
            choose(ctypes.c_bool(used))
            assert torch.equal(call(x), exact.to(torch.bfloat16))


def test_tensors_that_do_not_fit_are_refused(kernels: NativeKernels) -> None:
    conv2d, linear = kernels.operator("conv2d"), kernels.operator("linear")
    packed = kernels.pack(weights(8, 8), torch.ones(8), None, 1.0, 0)
    for x, weight, fault in (
        (codes(2, 8).to(torch.int8), packed, "uint8"),
        (codes(2, 12), packed, "packed bytes"),
        (codes(2, 8), packed[:-1], "packed bytes"),
        (codes(2, 8), packed.float(), "packed bytes"),
        (codes(2, 8), packed.repeat_interleave(2)[::2], "packed bytes"),
    ):
        with pytest.raises(RuntimeError, match=fault):
            linear(x, weight, 8, torch.float32)
    with pytest.raises(RuntimeError, match="bfloat16 or float32"):
        linear(codes(2, 8), packed, 8, torch.float16)
    with pytest.raises(RuntimeError, match="10 integers"):
        conv2d(codes(1, 8, 2, 2), packed, 0, [8, 1, 1], torch.float32)
    for geometry, fault in (
        ([8, 1, 1, 0, 1, 0, 0, 1, 1, 1], "positive"),
        ([8, 1, 1, 1, 1, -1, 0, 1, 1, 1], "positive"),
        ([8, 3, 3, 2, 2, 0, 0, 1, 1, 1], "larger than"),
        ([8, 1, 1, 1, 1, 0, 0, 1, 1, 3], "divide"),
    ):
        with pytest.raises(RuntimeError, match=fault):
            conv2d(codes(1, 8, 2, 2), packed, 0, geometry, torch.float32)


@pytest.mark.usefixtures("kernels")
def test_operators_agree_with_their_fakes() -> None:
    call = conv2d_call(
        weights(8, 4, 3, 3), torch.ones(8), None, 1.0, 0, ([2, 1], [1, 0], [1, 2], 1), None, torch.float32
    )
    linear = linear_call(weights(8, 4), torch.ones(8), None, 1.0, 0, torch.bfloat16)
    for subject, x in ((call, codes(2, 4, 9, 8)), (linear, codes(2, 3, 4))):
        operands = (x, *subject.tensors.values(), *subject.literals)
        torch.library.opcheck(subject.target, operands, test_utils=("test_schema", "test_faketensor"))


def test_largest_codes_and_weights_do_not_saturate(kernels: NativeKernels) -> None:
    """Every sign of both: 16 bits hold no pair of products of plain codes."""
    columns = torch.tensor([0, 1, 127, 128, 129, 255], dtype=torch.uint8)
    x = torch.cartesian_prod(*[columns] * 4)
    weight = torch.cartesian_prod(*[torch.tensor([-127, -1, 0, 127], dtype=torch.int8)] * 4)
    call = linear_call(weight, torch.ones(len(weight)), None, 1.0, 128, torch.float32)
    assert call.target is kernels.operator("linear")
    assert torch.equal(call(x).double(), (x.double() - 128) @ weight.double().T)


@pytest.mark.parametrize(("largest", "narrow"), [(16, True), (17, False)])
def test_channels_of_small_weights_are_told_from_others(largest: int, narrow: bool) -> None:
    """Eight weights that add up to 128 fit in 16 bits with codes of 255, to 129 they do not."""
    weight = torch.full((16, 32), 16, dtype=torch.int8)
    weight[3, 17] = largest
    packed = AVX2.pack(weight, torch.ones(16), None, 1.0, 0)
    assert packed[-4:].tolist() == [1, int(narrow), 0, 0]  # padded to four bytes
    if load_kernels(AVX2):
        x = torch.full((2, 32), 255, dtype=torch.uint8)
        result = AVX2.operator("linear")(x, packed, 16, torch.float32)
        assert torch.equal(result.double(), x.double() @ weight.double().T)


def test_weights_that_no_grid_has_are_refused_where_they_would_be_wrong() -> None:
    weight = torch.full((4, 4), -128, dtype=torch.int8)
    with pytest.raises(QuantSpecError, match="-127"):
        AVX2.pack(weight, torch.ones(4), None, 1.0, 0)
    VNNI.pack(weight, torch.ones(4), None, 1.0, 0)


@pytest.mark.parametrize(
    ("present", "wanted"),
    [
        (["avx2", "avx512_vnni"], VNNI),
        (["avx2", "avx512_vnni", "avx_vnni"], VNNI),
        (["avx2", "avx512_vnni", "avx_vnni", "amx_int8"], None),
        (["avx2"], AVX2),
        (["avx2", "avx_vnni"], None),
        ([], None),
    ],
)
def test_kernels_are_chosen_by_instruction_set(
    present: list[str], wanted: NativeKernels | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(x86_native, "load_kernels", lambda kernels: kernels.needs in present)
    monkeypatch.setattr(x86_native, "instruction_sets", lambda: present)
    assert native_kernels() is wanted


@pytest.mark.parametrize("fault", ["no compiler", "open quote", "not C++", "no folder"])
def test_without_a_library_a_warning_says_why(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86_native, "instruction_sets", lambda: [AVX2.needs])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = "no C\\+\\+ compiler: no-such-compiler"
    if fault == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler -O3")
    elif fault == "open quote":
        monkeypatch.setenv("CXX", "'g++")
        wanted = "closing quotation"
    elif fault == "not C++":
        (tmp_path / "layers.cpp").write_text("this is not C++\n")
        monkeypatch.setattr(x86_native, "_FOLDER", tmp_path)
        wanted = "layers.cpp"
    else:
        (tmp_path / "qdiff_fx").write_text("a file where the folder should be")
        wanted = "cannot be written"
    with pytest.warns(QDiffWarning, match=wanted):
        assert not load_kernels.__wrapped__(AVX2)
    assert not list(tmp_path.glob("qdiff_fx/*"))


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="the sources are for x86")
@pytest.mark.parametrize("kernels", [VNNI, AVX2], ids=lambda kernels: kernels.name)
def test_the_library_is_compiled_once_on_every_cpu(
    kernels: NativeKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = kernels.library()
    written = first.stat().st_mtime_ns
    assert kernels.library() == first and first.stat().st_mtime_ns == written
    assert [path.name for path in (tmp_path / "qdiff_fx").iterdir()] == [first.name]
