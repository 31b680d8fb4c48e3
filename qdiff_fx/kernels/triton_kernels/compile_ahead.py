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
from qdiff_fx.kernels.cuda_tiles import AttentionTile, Tile, pixel_block
from qdiff_fx.kernels.triton_kernels.attention import attention, score_accumulators
from qdiff_fx.kernels.triton_kernels.image_layer import image_gemm
from qdiff_fx.kernels.triton_kernels.launch import (
    EXACT,
    GROUP_M,
    RESCALE_TILE,
    SCORE_TILE,
    head_block,
    interpreted,
)
from qdiff_fx.kernels.triton_kernels.layer import implicit_gemm
from qdiff_fx.kernels.triton_kernels.rescale import rescale

INSTRUCTIONS: Mapping[int, str] = {
    8: r"mma\.sync\.[^;]*\.s8\.s8",
    9: r"wgmma\.mma_async\.[^;]*\.s8\.s8",
    10: r"tcgen05\.mma\.[^;]*i8",
}
"""The int8 tensor-core instruction of each generation, by major capability, as PTX spells it."""

IMAGE_SIDE = 32
"""Pixels of the square images that kernels are compiled for."""

_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8"}


@dataclass(frozen=True, kw_only=True)
class LayerVariant:
    """Everything that changes the code of a layer's kernel.

    Args:
      name: for tables.
      channels, outputs: of the layer.
      kernel, stride, padding, groups: of a square convolution; 1, 1, 0, 1 is a linear too.
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
    groups: int = 1
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
      instructions: int8 tensor-core instructions in its PTX: of the generation, or Ampere's for attention of fewer than
        64 queries a tile, which no later one takes.
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
    kinds = {
        **_epilogue(variant),
        "x": "*i8",
        "weight": "*i8",
        "weight_zero_point": "*i8" if variant.packed else None,
        "channel_shift": "*i8" if variant.shifted else None,
        "embedding": _POINTERS[variant.carrier] if variant.embedding else None,
    }
    constants = {
        "CHANNELS": variant.channels,
        "OUTPUTS": variant.outputs,
        "GROUPS": variant.groups,
        **{f"KERNEL_{axis}": variant.kernel for axis in "HW"},
        **{f"STRIDE_{axis}": variant.stride for axis in "HW"},
        **{f"PADDING_{axis}": variant.padding for axis in "HW"},
        **{f"DILATION_{axis}": 1 for axis in "HW"},
        "EMBEDDING_STRIDE": 3 * variant.outputs if variant.embedding else 0,
        "SILU": variant.silu,
        "NATIVE": True,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.outputs,
        "BLOCK_K": tile.depth,
        "GROUP_M": GROUP_M,
    }
    if tile.descriptors:
        pixels = pixel_block(tile.rows, 2, IMAGE_SIDE, IMAGE_SIDE) if variant.kernel > 1 else (1, 1, tile.rows)
        kinds |= {
            "x": f"tensordesc<i8{[*pixels, tile.depth]}>",
            "weight": f"tensordesc<i8{[tile.outputs, tile.depth]}>",
            "partial": "*i32" if tile.split > 1 else None,
            "arrived": "*i32" if tile.split > 1 else None,
        }
        constants |= {
            "DEPTH": variant.channels,
            "SPLIT": tile.split,
            **dict(zip(("IMAGES", "TILE_H", "TILE_W"), pixels, strict=True)),
        }
        own = {name: value for name, value in constants.items() if name in image_gemm.arg_names}
        return _compile(image_gemm, kinds, own, capability, tile.warps, tile.stages)
    return _compile(implicit_gemm, kinds, constants, capability, tile.warps, tile.stages)


def compile_rescale(variant: LayerVariant, capability: Capability) -> Compiled:
    """Compile the end of a layer whose product torch._int_mm makes: `outputs` and the epilogue of `variant`."""
    block_m, block_n, warps = RESCALE_TILE
    kinds = {**_epilogue(variant), "product": "*i32"}
    constants = {"OUTPUTS": variant.outputs, "SILU": variant.silu, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return _compile(rescale, kinds, constants, capability, warps, 1)


def _epilogue(variant: LayerVariant) -> dict[str, str | None]:
    carrier = _POINTERS[variant.carrier]
    return {
        "scale": "*fp32",
        "correction": "*i32",
        "bias": "*fp32",
        "residual": carrier if variant.residual else None,
        "inv_scale": "*fp32" if variant.requantize else None,
        "output": "*i8" if variant.requantize else carrier,
    }


def compile_scores(head: int, capability: Capability) -> Compiled:
    """Compile the kernel that gives attention's score accumulators alone."""
    block_m, block_n, warps = SCORE_TILE
    kinds: dict[str, str | None] = {"query": "*i8", "key": "*i8", "key_sums": "*i32", "output": "*i32"}
    constants = {"HEAD": head, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_E": head_block(head)}
    return _compile(score_accumulators, kinds, constants, capability, warps, 1)


def compile_attention(
    head: int,
    tile: AttentionTile,
    capability: Capability,
    *,
    mask: torch.dtype | None = None,
    causal: bool = False,
    carrier: torch.dtype = torch.float16,
) -> Compiled:
    """Compile attention over heads of size `head`.

    Args:
      mask: None without one; torch.int8 for a boolean mask, a floating type for one that is added.
      carrier: output dtype.
    """
    pointers = {"query": "*i8", "key": "*i8", "value": "*i8", "key_sums": "*i32", "value_sums": "*i32"}
    kinds = {
        **pointers,
        "mask": None if mask is None else _POINTERS[mask],
        "output": _POINTERS[carrier],
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
    generation = capability[0] if tile.queries >= 64 else 8
    return _compile(attention, kinds, constants, capability, tile.warps, tile.stages, generation)


def _compile(
    kernel: Any,
    kinds: Mapping[str, str | None],
    constants: Mapping[str, Any],
    capability: Capability,
    warps: int,
    stages: int,
    generation: int | None = None,
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
        instructions=len(re.findall(INSTRUCTIONS[generation or capability[0]], ptx)),
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
