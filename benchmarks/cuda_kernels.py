"""Compile every kernel variant of the cuda backend for every architecture, without a GPU, and tabulate what came out.

    python benchmarks/cuda_kernels.py --out docs/results-cuda-kernels.json

Each block shape that lowering may choose is compiled with each variant of weights and epilogue; so are attention's
masks and the end of layers whose product torch._int_mm makes. A kernel that spills registers, or a product whose PTX
lacks the int8 tensor-core instruction of its generation, makes the command fail. Rows of architectures that are not
named are kept; the table is written beside the JSON as .md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm

from qdiff_fx.kernels.cuda_gpu import GPUS, Capability
from qdiff_fx.kernels.cuda_tiles import AttentionTile, Product, Tile, attention_tiles, layer_tiles
from qdiff_fx.kernels.triton_kernels.compile_ahead import (
    INSTRUCTIONS,
    Compiled,
    LayerVariant,
    compile_attention,
    compile_layer,
    compile_rescale,
    compile_scores,
)
from qdiff_fx.kernels.triton_kernels.launch import RESCALE_TILE, SCORE_TILE
from qdiff_fx.safe_io import write_bytes, write_json

BF16, FP32 = torch.bfloat16, torch.float32
POINTWISE: dict[str, Any] = {"kernel": 1, "padding": 0}

VARIANTS = (
    LayerVariant(name="W8 3x3, embedding", embedding=True),
    LayerVariant(name="W8 3x3, embedding, residual, 640", channels=640, outputs=640, embedding=True, residual=True),
    LayerVariant(name="W8 3x3, residual, bf16", residual=True, carrier=BF16),
    LayerVariant(name="W8 3x3 stride 2, 640", stride=2, channels=640, outputs=640),
    LayerVariant(name="W8 3x3, 2 groups", groups=2),
    LayerVariant(name="W8 3x3, 4 channels, 4 outputs", channels=4, outputs=4),
    LayerVariant(name="W8 1x1", **POINTWISE),
    LayerVariant(name="W8 1x1, residual, 1280", channels=1280, outputs=1280, residual=True, **POINTWISE),
    LayerVariant(name="W8 1x1, SiLU, requantize", silu=True, requantize=True, **POINTWISE),
    LayerVariant(name="W8 1x1, fp32", carrier=FP32, **POINTWISE),
    LayerVariant(name="W4 3x3, shifts, embedding", packed=True, shifted=True, embedding=True),
    LayerVariant(name="W4 3x3, residual, bf16", packed=True, residual=True, carrier=BF16),
    LayerVariant(name="W4 3x3, shifts, embedding, 640", packed=True, shifted=True, channels=640, embedding=True),
    LayerVariant(name="W4 3x3 stride 2, 640", packed=True, stride=2, channels=640, outputs=640),
    LayerVariant(name="W4 3x3, 2 groups, shifts", packed=True, shifted=True, groups=2),
    LayerVariant(name="W4 3x3, 5 channels, 4 outputs", packed=True, channels=5, outputs=4),
    LayerVariant(name="W4 3x3, 36 channels, shifts", packed=True, shifted=True, channels=36, embedding=True),
    LayerVariant(name="W4 1x1, shifts, residual", packed=True, shifted=True, channels=1280, residual=True, **POINTWISE),
    LayerVariant(name="W4 1x1, SiLU, requantize", packed=True, silu=True, requantize=True, **POINTWISE),
)
ENDS = (
    LayerVariant(name="rescale"),
    LayerVariant(name="rescale, residual, bf16", residual=True, carrier=BF16),
    LayerVariant(name="rescale, residual, fp32, 1280", outputs=1280, residual=True, carrier=FP32),
    LayerVariant(name="rescale, SiLU, requantize", silu=True, requantize=True),
)
"""What follows torch._int_mm."""

HEADS = (40, 64, 80, 160, 512)
MASKS: Mapping[str, dict[str, Any]] = {
    "": {},
    ", bf16": {"carrier": BF16},
    ", mask": {"mask": torch.int8},
    ", added mask": {"mask": torch.float16},
    ", causal": {"causal": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--architectures", nargs="+", choices=[gpu.architecture for gpu in GPUS.values()])
    arguments = parser.parse_args()
    chosen = [key for key, gpu in GPUS.items() if gpu.architecture in (arguments.architectures or [gpu.architecture])]
    rows = list(tqdm(_compiled(chosen), desc="compiling", unit="kernels", disable=None))
    names = [GPUS[key].architecture for key in chosen]
    before = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    kept = [row for row in before if row["architecture"] not in names]
    rows = sorted((*kept, *rows), key=lambda row: int(row["architecture"].removeprefix("sm_")))
    results = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
    write_json(arguments.out, results)
    write_bytes(arguments.out.with_suffix(".md"), table(results).encode())
    bad = [row for row in rows if row["spilled"] or (row["product"] and not row["instructions"])]
    for row in bad:
        print(row, file=sys.stderr)
    sys.exit(bool(bad))


def _compiled(capabilities: Sequence[Capability]) -> Iterator[dict[str, Any]]:
    for capability in capabilities:
        for variant in VARIANTS:
            for tile in _tiles(variant, capability):
                yield _row(variant.name, str(tile), capability, compile_layer(variant, tile, capability))
        for head in HEADS:
            for tile in attention_tiles(head, GPUS[capability]):
                yield from _attention(head, tile, capability)
        yield _row("scores, head 64", _shape(SCORE_TILE), capability, compile_scores(64, capability))
        for variant in ENDS:
            yield _row(variant.name, _shape(RESCALE_TILE), capability, compile_rescale(variant, capability))


def _tiles(variant: LayerVariant, capability: Capability) -> tuple[Tile, ...]:
    product = Product(
        rows=1,
        outputs=variant.outputs // variant.groups,
        depth=variant.channels // variant.groups,
        taps=variant.kernel**2,
        groups=variant.groups,
        packed=variant.packed,
        stride_one=variant.stride == 1,
    )
    return layer_tiles(product, GPUS[capability])


def _attention(head: int, tile: AttentionTile, capability: Capability) -> Iterator[dict[str, Any]]:
    masks = MASKS if head < 512 else {mask: MASKS[mask] for mask in ("", ", added mask")}  # minutes each
    for mask, options in masks.items():
        compiled = compile_attention(head, tile, capability, **options)
        yield _row(f"attention, head {head}{mask}", str(tile), capability, compiled)


def _shape(tile: tuple[int, int, int]) -> str:
    return f"{tile[0]}x{tile[1]}, {tile[2]} warps"


def _row(name: str, tile: str, capability: Capability, compiled: Compiled) -> dict[str, Any]:
    return {
        "architecture": GPUS[capability].architecture,
        "kernel": name,
        "tile": tile,
        "product": not name.startswith("rescale"),
        "instructions": compiled.instructions,
        "registers": compiled.registers,
        "spilled": compiled.spilled,
        "shared_memory": compiled.shared_memory,
    }


def table(results: Mapping[str, Any]) -> str:
    rows = results["rows"]
    spilling = sum(row["spilled"] > 0 for row in rows)
    lines = [
        "# Kernels of the cuda backend, compiled ahead of time",
        "",
        "Written by `python benchmarks/cuda_kernels.py --out docs/results-cuda-kernels.json`, which needs no GPU:",
        "every block shape that lowering may choose, with every variant of weights and epilogue (with 320 channels and",
        "outputs where the name says nothing else, fp16 carrier, bias), attention with every kind of mask, and what",
        "follows torch._int_mm (`rescale`, which has no product of its own).",
        "",
        f"Triton {results['triton']}, torch {results['torch']}; {len(rows)} kernels, {spilling} spill registers.",
        "The int8 tensor-core instruction that was looked for in the PTX of each (for heads of 512, whose tiles are",
        "narrower than the later ones take, `mma.sync` everywhere):",
        "",
        "| architecture | instruction | products | with it | most registers a thread | spilled bytes |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for gpu in GPUS.values():
        mine = [row for row in rows if row["architecture"] == gpu.architecture]
        if mine:
            products = [row for row in mine if row["product"]]
            found = sum(row["instructions"] > 0 for row in products)
            pattern = INSTRUCTIONS[gpu.capability[0]].replace("\\", "").replace("[^;]*", "...")
            lines.append(
                f"| {gpu.architecture} | `{pattern}` | {len(products)} | {found} | "
                f"{max(row['registers'] for row in mine)} | {sum(row['spilled'] for row in mine)} |"
            )
    lines += [
        "",
        "Registers a thread and shared memory a block (KiB) by shape, the most over all variants:",
        "",
        "| architecture | kernels | tile (rows x outputs x depth) | registers | spilled bytes | shared memory |",
        "|---|---|---|---:|---:|---:|",
    ]
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        kind = row["kernel"].split()[0].rstrip(",")
        groups.setdefault((row["architecture"], kind, row["tile"]), []).append(row)
    for (architecture, kind, tile), members in groups.items():
        most = {key: max(row[key] for row in members) for key in ("registers", "spilled", "shared_memory")}
        lines.append(
            f"| {architecture} | {kind} | {tile} | {most['registers']} | {most['spilled']} | "
            f"{most['shared_memory'] / 1024:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
