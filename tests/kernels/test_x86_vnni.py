"""Our own AVX512-VNNI operators: exact sums in every layout, faults refused, and oneDNN's where they cannot be had."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qdiff_fx.errors import QDiffWarning
from qdiff_fx.kernels import reference, x86_calls, x86_vnni
from qdiff_fx.kernels.x86_calls import KernelCall, conv2d_call, linear_call
from qdiff_fx.kernels.x86_vnni import load_vnni, pack_vnni, vnni_available
from subjects import codes

qdiff = torch.ops.qdiff


@pytest.fixture
def vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    if not load_vnni():
        pytest.skip("the CPU has no AVX512-VNNI")
    monkeypatch.setattr(x86_calls, "vnni_available", load_vnni)


def weights(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


@pytest.mark.usefixtures("vnni")
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
    assert call.target is qdiff.vnni_conv2d.default
    wanted = functional.conv2d(x.double() - zero_point, weight.double(), None, stride, padding, dilation, groups)
    result = call(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(result.double(), wanted.float().double())  # |sums| may pass 2^24, where float32 rounds
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("vnni")
@pytest.mark.parametrize("threads", [1, 2])
def test_views_and_threads_change_nothing(threads: int) -> None:
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
    assert call.target is qdiff.vnni_linear.default
    assert torch.equal(call(tokens).double(), (tokens.double() - 9) @ matrix.double().T)


@pytest.mark.usefixtures("vnni")
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 30), features=st.integers(1, 70), outputs=st.integers(1, 70), zero_point=st.integers(0, 255))
def test_sums_of_linears_are_exact(rows: int, features: int, outputs: int, zero_point: int) -> None:
    x, weight = codes(rows, features), weights(outputs, features)
    call = linear_call(weight, torch.ones(outputs), None, 1.0, zero_point, torch.float32)
    assert call.target is qdiff.vnni_linear.default
    assert torch.equal(call(x).double(), (x.double() - zero_point) @ weight.double().T)


@pytest.mark.usefixtures("vnni")
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


@pytest.mark.usefixtures("vnni")
def test_both_ways_to_bfloat16_round_to_nearest_even() -> None:
    call = linear_call(
        torch.ones(33, 4, dtype=torch.int8), torch.rand(33) - 0.5, torch.randn(33), 0.37, 3, torch.bfloat16
    )
    x = codes(40, 4)
    exact = KernelCall(target=call.target, tensors=call.tensors, literals=(33, torch.float32))(x)
    choose = ctypes.CDLL(str(x86_vnni._library())).qdiff_vnni_use_bfloat16_instruction
    for used in (False, True):
        choose(ctypes.c_bool(used))
        assert torch.equal(call(x), exact.to(torch.bfloat16))


@pytest.mark.usefixtures("vnni")
def test_tensors_that_do_not_fit_are_refused() -> None:
    packed = pack_vnni(weights(8, 8), torch.zeros(8, dtype=torch.int32), torch.ones(8), torch.zeros(8))
    for x, weight, fault in (
        (codes(2, 8).to(torch.int8), packed, "uint8"),
        (codes(2, 12), packed, "packed bytes"),
        (codes(2, 8), packed[:-1], "packed bytes"),
        (codes(2, 8), packed.float(), "packed bytes"),
        (codes(2, 8), packed.repeat_interleave(2)[::2], "packed bytes"),
    ):
        with pytest.raises(RuntimeError, match=fault):
            qdiff.vnni_linear(x, weight, 8, torch.float32)
    with pytest.raises(RuntimeError, match="bfloat16 or float32"):
        qdiff.vnni_linear(codes(2, 8), packed, 8, torch.float16)
    with pytest.raises(RuntimeError, match="10 integers"):
        qdiff.vnni_conv2d(codes(1, 8, 2, 2), packed, 0, [8, 1, 1], torch.float32)
    for geometry, fault in (
        ([8, 1, 1, 0, 1, 0, 0, 1, 1, 1], "positive"),
        ([8, 1, 1, 1, 1, -1, 0, 1, 1, 1], "positive"),
        ([8, 3, 3, 2, 2, 0, 0, 1, 1, 1], "larger than"),
        ([8, 1, 1, 1, 1, 0, 0, 1, 1, 3], "divide"),
    ):
        with pytest.raises(RuntimeError, match=fault):
            qdiff.vnni_conv2d(codes(1, 8, 2, 2), packed, 0, geometry, torch.float32)


@pytest.mark.usefixtures("vnni")
def test_operators_agree_with_their_fakes() -> None:
    call = conv2d_call(
        weights(8, 4, 3, 3), torch.ones(8), None, 1.0, 0, ([2, 1], [1, 0], [1, 2], 1), None, torch.float32
    )
    linear = linear_call(weights(8, 4), torch.ones(8), None, 1.0, 0, torch.bfloat16)
    for subject, x in ((call, codes(2, 4, 9, 8)), (linear, codes(2, 3, 4))):
        operands = (x, *subject.tensors.values(), *subject.literals)
        torch.library.opcheck(subject.target, operands, test_utils=("test_schema", "test_faketensor"))


def test_with_amx_onednn_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86_vnni, "load_vnni", lambda: True)
    for present, wanted in ((["avx512_vnni"], True), (["avx512_vnni", "amx_int8"], False)):
        monkeypatch.setattr(x86_vnni, "instruction_sets", lambda present=present: present)
        assert vnni_available() is wanted


@pytest.mark.parametrize("fault", ["no compiler", "open quote", "not C++", "no folder"])
def test_without_a_library_a_warning_says_why(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86_vnni, "instruction_sets", lambda: ["avx512_vnni"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = "no C\\+\\+ compiler: no-such-compiler"
    if fault == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler -O3")
    elif fault == "open quote":
        monkeypatch.setenv("CXX", "'g++")
        wanted = "closing quotation"
    elif fault == "not C++":
        source = tmp_path / "wrong.cpp"
        source.write_text("this is not C++\n")
        monkeypatch.setattr(x86_vnni, "_SOURCES", (source,))
        wanted = "wrong.cpp"
    else:
        (tmp_path / "qdiff_fx").write_text("a file where the folder should be")
        wanted = "cannot be written"
    with pytest.warns(QDiffWarning, match=wanted):
        assert not load_vnni.__wrapped__()
    assert not list(tmp_path.glob("qdiff_fx/*"))


@pytest.mark.usefixtures("vnni")
def test_the_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = x86_vnni._library()
    written = first.stat().st_mtime_ns
    assert x86_vnni._library() == first and first.stat().st_mtime_ns == written
    assert [path.name for path in (tmp_path / "qdiff_fx").iterdir()] == [first.name]
