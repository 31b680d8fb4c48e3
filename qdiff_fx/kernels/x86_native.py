"""Kernels of our own for x86: convolutions and linears for AVX512-VNNI and for AVX2, attention for the former.

A call costs what it computes: oneDNN's operator makes a primitive descriptor every time, 25 to 50 us on layers whose
arithmetic takes 5 (docs/decisions/012); torch's attention multiplies in the carrier type (013). On AVX2 oneDNN's
products saturate, ours are exact (014). The operators are C++ (`x86_sources/`), compiled once a machine by the compiler
that torch.compile needs too, in seconds, and kept in the user's cache folder. They take uint8 codes and write float32
or bfloat16.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdiff_fx.errors import DiskError, QDiffWarning, QuantSpecError
from qdiff_fx.kernels.empty_image import empty_image
from qdiff_fx.kernels.machine import instruction_sets
from qdiff_fx.safe_io import replacing

_LARGEST = 127
"""Of weight codes: the grid is symmetric, and sums on AVX2 are exact because of it."""
_LARGEST_CODE, _MIDDLE = 255, 128
"""Of input codes, and what is taken from them where weights are not small (x86_sources/avx2.hpp)."""
_CHANNEL_GROUP, _SPAN = 4, 4
"""Input channels of one instruction; such groups whose products are added in 16 bits, kSpan of the source."""
_ROWS = 64
"""Outputs that are looked at together: sums of magnitudes take twice the bytes of their weights."""

_FOLDER = Path(__file__).with_name("x86_sources")
_OPTIONS = (
    "-O2",
    "-ffp-contract=off",  # a fused multiply-add would round once where the reference rounds twice
    "-std=c++20",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",  # names mean other things in the library of another instruction set
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable interface of torch 2.11, the oldest that we run on
)


@dataclass(frozen=True, kw_only=True)
class NativeKernels:
    """Operators for one instruction set, `qdiff::NAME_conv2d` and so on.

    Args:
      name: what their names begin with.
      needs: the instruction set, as instruction_sets() calls it.
      registers: the header that the sources are compiled with.
      operators: kinds that there are, "conv2d", "linear" and "attention"; the latter in a source of its own.
      output_block: outputs that a block of the packed weight has, kLanes of the source.
      saturates: whether products are added in 16 bits. Then channels are told apart by the size of their weights.
      otherwise: what users have without these kernels.
    """

    name: str
    needs: str
    registers: str
    operators: tuple[str, ...]
    output_block: int
    saturates: bool
    otherwise: str

    def operator(self, kind: str) -> Any:
        """The overload of one of `operators`; load_kernels() registers it."""
        return getattr(torch.ops.qdiff, f"{self.name}_{kind}").default

    def library(self) -> Path:
        """The compiled operators. Raises OSError without a compiler, CalledProcessError if it refuses, DiskError."""
        root = Path(torch.__file__).parent
        command = [*find_compiler(), *_OPTIONS, f'-DQDIFF_NAME="{self.name}"', f'-DQDIFF_REGISTERS="{self.registers}"']
        command += [f"-I{root / 'include'}", f"-L{root / 'lib'}"]
        sources = dict.fromkeys("attention.cpp" if kind == "attention" else "layers.cpp" for kind in self.operators)
        command += [*(str(_FOLDER / source) for source in sources), "-ltorch_cpu"]
        key = "\0".join([*command, str(torch.__version__), kernel_digest()]).encode()
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdiff_fx"
        path = folder / f"x86_{self.name}-{hashlib.sha256(key).hexdigest()[:16]}.so"
        if not path.is_file():
            with replacing(path) as partial:
                subprocess.run([*command, "-o", str(partial)], check=True, capture_output=True, text=True)
        return path

    def pack(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        x_scale: float,
        x_zero_point: int,
        groups: int = 1,
    ) -> Tensor:
        """All that a layer keeps as bytes: int8 [N]; groups follow each other.

        Of each group codes [ceil(O / block), kernel elements, ceil(C / 4), block, 4], then what is added to the sums
        (int32), the scale of weight and input together and the bias (float32), and where products saturate, for every
        16 channels whether their weights are small; outputs and channels are filled up with zeros to whole blocks and
        fours.

        Args:
          weight: [O, C / groups, ...] int8, from -127 to 127.
          weight_scale, bias: [O] float32.
          x_scale, x_zero_point: of the codes.

        Raises: QuantSpecError for a weight of -128 where products saturate.
        """
        if self.saturates and weight.numel() and int(weight.min()) < -_LARGEST:
            raise QuantSpecError(f"weight codes down to {int(weight.min())}: want [-{_LARGEST}, {_LARGEST}]")
        added = torch.zeros_like(weight_scale) if bias is None else bias
        split = (tensor.chunk(groups) for tensor in (weight, weight_scale * x_scale, added))
        parts = [self._pack_group(*tensors, x_zero_point=x_zero_point) for tensors in zip(*split, strict=True)]
        return parts[0] if groups == 1 else torch.cat(parts)

    def _pack_group(self, weight: Tensor, scale: Tensor, bias: Tensor, *, x_zero_point: int) -> Tensor:
        outputs, channels = weight.shape[:2]
        kernel = weight[0, 0].numel()
        blocks, groups = -(-outputs // self.output_block), -(-channels // _CHANNEL_GROUP)
        filled = weight.new_zeros(blocks * self.output_block, groups * _CHANNEL_GROUP, kernel)
        filled[:outputs, :channels] = weight.reshape(outputs, channels, kernel)
        codes = filled.view(blocks, self.output_block, groups, _CHANNEL_GROUP, kernel).permute(0, 4, 2, 1, 3)
        offset = -x_zero_point * filled.sum((1, 2), dtype=torch.int32)
        spans = weight.new_zeros(0)
        if self.saturates:
            narrow = _narrow_spans(filled)
            wide = ~narrow.repeat_interleave(_SPAN * _CHANNEL_GROUP)[: filled.shape[1]]
            offset += _MIDDLE * filled[:, wide].sum((1, 2), dtype=torch.int32)
            spans = torch.nn.functional.pad(narrow.to(torch.int8), (0, -len(narrow) % 4))
        rows = [torch.nn.functional.pad(row, (0, -outputs % self.output_block)) for row in (scale, bias)]
        tail = torch.cat([offset.view(torch.int8), *(row.view(torch.int8) for row in rows), spans])
        packed = weight.new_empty(codes.numel() + len(tail))
        packed[: codes.numel()].view(codes.shape).copy_(codes)  # the weight stands in memory twice, not three times
        packed[codes.numel() :] = tail
        return packed


def _narrow_spans(weight: Tensor) -> Tensor:
    """For every 16 channels of [O, C, K] whether sums of their products by codes fit in 16 bits: bool [ceil(C / 16)].

    Pairs of neighbouring channels meet in one number, and those of the span's four groups are added to it.
    """
    channels = weight.shape[1]
    sizes = torch.stack([_span_sizes(rows) for rows in torch.split(weight, _ROWS)]).amax(0)
    narrow = sizes * _LARGEST_CODE <= torch.iinfo(torch.int16).max
    if channels % (_SPAN * _CHANNEL_GROUP):
        narrow[-1] = False  # the kernel takes whole spans only
    return narrow


def _span_sizes(weight: Tensor) -> Tensor:
    """The largest sum of magnitudes that meets in one number, for every 16 channels: int32 [ceil(C / 16)]."""
    outputs, channels, kernel = weight.shape
    pairs = weight.abs().view(outputs, channels // _CHANNEL_GROUP, 2, 2, kernel).sum(3, dtype=torch.int32)
    pairs = torch.nn.functional.pad(pairs, (0, 0, 0, 0, 0, -pairs.shape[1] % _SPAN))
    return pairs.view(outputs, -1, _SPAN, 2, kernel).sum(2).amax((0, 2, 3))


VNNI = NativeKernels(
    name="vnni",
    needs="avx512_vnni",
    registers="avx512_vnni.hpp",
    operators=("conv2d", "linear", "attention"),
    output_block=32,
    saturates=False,
    otherwise="layers run on oneDNN's, which take longer where layers are small, and attention in floating point, up "
    "to three times as long",
)
AVX2 = NativeKernels(
    name="avx2",
    needs="avx2",
    registers="avx2.hpp",
    operators=("conv2d", "linear"),
    output_block=16,
    saturates=True,
    otherwise="there are no others that are right on this CPU",
)


def native_kernels() -> NativeKernels | None:
    """Those that layers should run on here, None where oneDNN's should.

    With AMX oneDNN's multiply several times faster than VNNI can, with AVX-VNNI in half the instructions of AVX2;
    without any of them they saturate.
    """
    present = instruction_sets()
    if "amx_int8" in present:
        return None
    kernels = VNNI if VNNI.needs in present else None if "avx_vnni" in present else AVX2
    return kernels if kernels is not None and load_kernels(kernels) else None


@cache
def load_kernels(kernels: NativeKernels) -> bool:
    """Whether the operators can run here; registers them. Without a compiler a warning says so, once."""
    if kernels.needs not in instruction_sets():
        return False
    try:
        torch.ops.load_library(str(kernels.library()))  # type: ignore[no-untyped-call]
    except (OSError, DiskError, subprocess.CalledProcessError, ValueError, RuntimeError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        warnings.warn(
            f"qdiff_fx's int8 kernels for {kernels.needs} could not be compiled: {kernels.otherwise}. torch.compile "
            f"needs a C++ compiler too (CXX names one): {detail.strip()[-500:]}",
            QDiffWarning,
            stacklevel=2,
        )
        return False
    for kind in kernels.operators:
        torch.library.register_fake(f"qdiff::{kernels.name}_{kind}", _FAKES[kind])
    return True


def find_compiler() -> list[str]:
    """The C++ compiler's command. Raises FileNotFoundError without one, ValueError for a CXX with an open quote."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]) is not None:
            return command
    raise FileNotFoundError(f"no C++ compiler: {named[0] if named else 'c++, g++ or clang++'} is not in PATH")


def kernel_digest() -> str:
    """Of the operators' source and options."""
    text = b"\0".join(path.read_bytes() for path in sorted(_FOLDER.iterdir()) if path.suffix in (".cpp", ".hpp"))
    return hashlib.sha256("\0".join(_OPTIONS).encode() + text).hexdigest()[:16]


def _conv2d_fake(
    x: Tensor,
    weight: Tensor,
    x_zero_point: int,
    geometry: Sequence[int],
    output_dtype: torch.dtype,
) -> Tensor:
    outputs, *pairs, _ = geometry
    kernel, stride, padding, dilation = (pairs[start : start + 2] for start in range(0, 8, 2))
    return empty_image(x, (outputs, x.shape[1], *kernel), stride, padding, dilation, output_dtype)


def _linear_fake(x: Tensor, weight: Tensor, outputs: int, output_dtype: torch.dtype) -> Tensor:
    return torch.empty((*x.shape[:-1], outputs), dtype=output_dtype, device=x.device)


def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_scale: float,
    value_scale: float,
    zero_points: Sequence[int],
    qmax: int,
    output_dtype: torch.dtype,
) -> Tensor:
    *leading, length, _ = query.shape
    size = value.shape[-1]
    if len(leading) == 1:
        return torch.empty((*leading, length, size), dtype=output_dtype, device=query.device)
    batch, heads = leading
    return torch.empty((batch, length, heads, size), dtype=output_dtype, device=query.device).transpose(1, 2)


_FAKES: dict[str, Callable[..., Tensor]] = {
    "conv2d": _conv2d_fake,
    "linear": _linear_fake,
    "attention": _attention_fake,
}
