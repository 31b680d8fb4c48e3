"""Kernels of our own for CPUs with AVX512-VNNI: `qdiff::vnni_conv2d`, `qdiff::vnni_linear`, `qdiff::vnni_attention`.

A call costs what it computes: oneDNN's operator makes a primitive descriptor every time, 25 to 50 us on layers whose
arithmetic takes 5 (docs/decisions/012); torch's attention multiplies in the carrier type (013). The operators are C++
(`x86_vnni.cpp`, `x86_attention.cpp`), compiled once a machine by the compiler that torch.compile needs too, in seconds,
and kept in the user's cache folder. They take uint8 codes and write float32 or bfloat16.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qdiff_fx.errors import DiskError, QDiffWarning
from qdiff_fx.kernels.empty_image import empty_image
from qdiff_fx.kernels.machine import instruction_sets
from qdiff_fx.safe_io import replacing

CHANNEL_GROUP = 4
"""Input channels that one instruction multiplies and adds."""
OUTPUT_BLOCK = 32
"""Outputs that a block of the packed weight has, kLanes of the source."""

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("x86_vnni.cpp", "x86_attention.cpp"))
_HEADER = Path(__file__).with_name("x86_vnni.hpp")
_OPTIONS = (
    "-O2",
    "-ffp-contract=off",  # a fused multiply-add would round once where the reference rounds twice
    "-std=c++20",
    "-shared",
    "-fPIC",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable interface of torch 2.11, the oldest that we run on
)


def vnni_available() -> bool:
    """Whether layers should run on these operators: with AMX oneDNN's multiply several times faster than VNNI can."""
    return "amx_int8" not in instruction_sets() and load_vnni()


@cache
def load_vnni() -> bool:
    """Whether the operators can run here; registers them. Without a compiler a warning says so, once."""
    if "avx512_vnni" not in instruction_sets():
        return False
    try:
        torch.ops.load_library(str(_library()))  # type: ignore[no-untyped-call]
    except (OSError, DiskError, subprocess.CalledProcessError, ValueError, RuntimeError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        warnings.warn(
            "qdiff_fx's int8 kernels for AVX512-VNNI could not be compiled: layers run on oneDNN's, which take longer "
            "where layers are small, and attention in floating point, up to three times as long. torch.compile "
            f"needs a C++ compiler too (CXX names one): {detail.strip()[-500:]}",
            QDiffWarning,
            stacklevel=2,
        )
        return False
    torch.library.register_fake("qdiff::vnni_conv2d", _conv2d_fake)
    torch.library.register_fake("qdiff::vnni_linear", _linear_fake)
    torch.library.register_fake("qdiff::vnni_attention", _attention_fake)
    return True


def pack_vnni(weight: Tensor, offset: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """All that a layer, or one group of it, keeps as bytes: int8 [N]; groups follow each other.

    Codes [ceil(O / 32), kernel elements, ceil(C / 4), 32, 4], then `offset`, `scale` and `bias`; outputs and channels
    are filled up with zeros to whole blocks of 32 and 4.

    Args:
      weight: [O, C, ...] int8.
      offset: [O] int32, what is added to the sums: minus the zero point times the sum of the output's weights.
      scale: [O] float32, of weight and input together.
      bias: [O] float32.
    """
    outputs, channels = weight.shape[:2]
    kernel = weight[0, 0].numel()
    blocks, groups = -(-outputs // OUTPUT_BLOCK), -(-channels // CHANNEL_GROUP)
    filled = weight.new_zeros(blocks * OUTPUT_BLOCK, groups * CHANNEL_GROUP, kernel)
    filled[:outputs, :channels] = weight.reshape(outputs, channels, kernel)
    codes = filled.view(blocks, OUTPUT_BLOCK, groups, CHANNEL_GROUP, kernel).permute(0, 4, 2, 1, 3)
    rows = torch.stack([offset, scale.view(torch.int32), bias.view(torch.int32)])
    rows = torch.nn.functional.pad(rows, (0, -outputs % OUTPUT_BLOCK))
    return torch.cat([codes.flatten(), rows.view(torch.int8).flatten()])


def _library() -> Path:
    """The compiled operators. Raises OSError without a compiler, CalledProcessError if it refuses, DiskError."""
    root = Path(torch.__file__).parent
    command = [*find_compiler(), *_OPTIONS, f"-I{root / 'include'}", f"-L{root / 'lib'}"]
    command += [*map(str, _SOURCES), "-ltorch_cpu"]
    key = "\0".join([*command, str(torch.__version__), kernel_digest()]).encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdiff_fx"
    path = folder / f"x86_vnni-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not path.is_file():
        with replacing(path) as partial:
            subprocess.run([*command, "-o", str(partial)], check=True, capture_output=True, text=True)
    return path


def find_compiler() -> list[str]:
    """The C++ compiler's command. Raises FileNotFoundError without one, ValueError for a CXX with an open quote."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]) is not None:
            return command
    raise FileNotFoundError(f"no C++ compiler: {named[0] if named else 'c++, g++ or clang++'} is not in PATH")


def kernel_digest() -> str:
    """Of the operators' source and options."""
    text = b"\0".join(path.read_bytes() for path in (_HEADER, *_SOURCES))
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
