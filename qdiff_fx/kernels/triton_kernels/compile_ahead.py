"""Compile the kernels for a GPU that is not there, and read what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qdiff_fx.errors import BackendError
from qdiff_fx.kernels.cuda_gpu import Capability
from qdiff_fx.kernels.cuda_tiles import AttentionTile, Tile
from qdiff_fx.kernels.triton_kernels.attention import attention
from qdiff_fx.kernels.triton_kernels.launch import EXACT, GROUP_M, head_block, interpreted
from qdiff_fx.kernels.triton_kernels.layer import implicit_gemm

INSTRUCTIONS: Mapping[int, str] = {
    8: r"mma\.sync\.[^;]*\.s8\.s8",
    9: r"wgmma\.mma_async\.[^;]*\.s8\.s8",
    10: r"tcgen05\.mma\.[^;]*i8",
}
"""The int8 tensor-core instruction of each generation, by major capability, as PTX spells it."""

_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8"}


@dataclass(frozen=True, kw_only=True)
class LayerVariant:
    """Everything that changes the code of a layer's kernel.

    Args:
      name: for tables.
      channels, outputs: of the layer.
      kernel, stride, padding: of a square convolution; 1, 1, 0 is a linear too.
      packed, shifted: 4-bit weights, with channel shifts.
      embedding, residual, silu, requantize: steps of the epilogue; a bias is always added.
      carrier: output dtype, and that of embedding and residual.
    """

    name: str
    channels: int = 320
    outputs: int = 320
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    packed: bool = False
    shifted: bool = False
    embedding: bool = False
    residual: bool = False
    silu: bool = False
    requantize: bool = False
    carrier: torch.dtype = torch.float16


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of a kernel.

    Args:
      instructions: int8 tensor-core instructions of the generation in its PTX.
      registers: a thread.
      spilled: bytes a thread that did not fit into registers.
      shared_memory: bytes a block.
      ptx: its text.
    """

    instructions: int
    registers: int
    spilled: int
    shared_memory: int
    ptx: str


def compile_layer(variant: LayerVariant, tile: Tile, capability: Capability) -> Compiled:
    """Compile `variant` with `tile`. Raises BackendError under the interpreter, which compiles nothing."""
    carrier = _POINTERS[variant.carrier]
    kinds = {
        "x": "*i8",
        "weight": "*i8",
        "scale": "*fp32",
        "correction": "*i32",
        "weight_zero_point": "*i8" if variant.packed else None,
        "channel_shift": "*i8" if variant.shifted else None,
        "bias": "*fp32",
        "embedding": carrier if variant.embedding else None,
        "residual": carrier if variant.residual else None,
        "inv_scale": "*fp32" if variant.requantize else None,
        "output": "*i8" if variant.requantize else carrier,
    }
    constants = {
        "CHANNELS": variant.channels,
        "OUTPUTS": variant.outputs,
        "GROUPS": 1,
        **{f"KERNEL_{axis}": variant.kernel for axis in "HW"},
        **{f"STRIDE_{axis}": variant.stride for axis in "HW"},
        **{f"PADDING_{axis}": variant.padding for axis in "HW"},
        **{f"DILATION_{axis}": 1 for axis in "HW"},
        "SILU": variant.silu,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.outputs,
        "BLOCK_K": tile.depth,
        "GROUP_M": GROUP_M,
    }
    return _compile(implicit_gemm, kinds, constants, capability, tile.warps, tile.stages)


def compile_attention(
    head: int, tile: AttentionTile, capability: Capability, *, masked: bool = False, causal: bool = False
) -> Compiled:
    """Compile attention over heads of size `head`."""
    pointers = {"query": "*i8", "key": "*i8", "value": "*i8", "key_sums": "*i32", "value_sums": "*i32"}
    kinds = {
        **pointers,
        "mask": "*i8" if masked else None,
        "output": "*fp16",
        "score_scale": "fp32",
        "output_scale": "fp32",
    }
    constants = {
        "CAUSAL": causal,
        "HEAD": head,
        "VALUE_HEAD": head,
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "BLOCK_E": head_block(head),
        "BLOCK_D": head_block(head),
    }
    return _compile(attention, kinds, constants, capability, tile.warps, tile.stages)


def _compile(
    kernel: Any,
    kinds: Mapping[str, str | None],
    constants: Mapping[str, Any],
    capability: Capability,
    warps: int,
    stages: int,
) -> Compiled:
    if interpreted():
        raise BackendError("kernels are compiled where TRITON_INTERPRET is not set; unset it")
    names = kernel.arg_names
    absent = {name: None for name, kind in kinds.items() if kind is None}
    values = {**constants, **absent}
    signature = {name: "constexpr" if name in values else kinds.get(name, "i32") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if str(signature[name]).startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    done: Any = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages, **EXACT})
    registers, spilled = _usage(done.asm["cubin"])
    ptx = str(done.asm["ptx"])
    return Compiled(
        instructions=len(re.findall(INSTRUCTIONS[capability[0]], ptx)),
        registers=registers,
        spilled=spilled,
        shared_memory=int(done.metadata.shared),
        ptx=ptx,
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes a thread on its stack: nothing but spilled values lies there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]
