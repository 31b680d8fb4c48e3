"""Times of every layer of Stable Diffusion's UNets on a GPU with each block shape that lowering may choose.

    python benchmarks/cuda_tiles.py sd15 sdxl --out docs/results-cuda-tiles.json

What `cuda_tiles.tile_cycles` and the shares of `cuda_model` are fitted to. Weights are random; kernels are timed in
replayed CUDA graphs, weights read from memory, beside the vendor's kernel in fp16. The page is written beside the JSON
as .md; rows that have every tile are kept unless --again, and without architectures only the page is written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from architectures import ARCHITECTURES, abstract_plan
from qdiff_fx.autotune.cuda import layer_runs
from qdiff_fx.autotune.layer_size import LayerSize, layer_size
from qdiff_fx.autotune.timer import gpu_kernel_seconds
from qdiff_fx.kernels import BACKENDS
from qdiff_fx.kernels.cuda_gpu import GPUS, gpu_for
from qdiff_fx.kernels.cuda_tiles import Product, Tile, layer_tiles
from qdiff_fx.passes.lower.cuda_target import layer_work
from qdiff_fx.passes.lower.integer_layers import integer_layer
from qdiff_fx.safe_io import write_bytes, write_json

VENDOR = "fp16"
WEIGHTS = {"int8": "W8", "int4": "W4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", choices=[*ARCHITECTURES, []])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--again", action="store_true", help="time again what the file holds already")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {"device": None}
    if not options.architectures and "layers" not in results:
        parser.error(f"{options.out} holds nothing yet: name an architecture")
    if options.architectures:
        if (reason := BACKENDS["cuda"].unavailable("cuda")) is not None:
            sys.exit(f"cuda_tiles.py: {reason}")
        device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        if options.again or results["device"] != device:
            results = {"device": device, "layers": {}, "counts": {}}
        layers = counted_layers(options.architectures)
        for name in options.architectures:
            results["counts"][name] = sum(layer.counts.get(name, 0) for layer in layers.values())
        missing = {key: layer for key, layer in layers.items() if not complete(results["layers"].get(key), layer)}
        for key in layers.keys() - missing.keys():
            results["layers"][key]["counts"].update(layers[key].counts)
        compile_ahead(list(missing.values()))
        for key, layer in tqdm(missing.items(), desc="timing", unit="layers", disable=None):
            counts = results["layers"].get(key, {}).get("counts", {}) | layer.counts
            results["layers"][key] = {"counts": counts, **timed(layer)}
            write_json(options.out, results)
        results.pop("remark", None)
        write_json(options.out, results)
    write_bytes(options.out.with_suffix(".md"), page(results).encode())


@dataclass(frozen=True, kw_only=True)
class CountedLayer:
    """A layer's size, the same as a product with int8 weights, and how often each architecture has it."""

    size: LayerSize
    product: Product
    counts: dict[str, int]


def counted_layers(architectures: Sequence[str]) -> dict[str, CountedLayer]:
    """Distinct layers of the architectures by the key of their size."""
    found: dict[str, CountedLayer] = {}
    for name in architectures:
        plan, _ = abstract_plan(name, "w8a8")
        for node in plan.graph.nodes:
            if (layer := integer_layer(node)) is not None:
                size = replace(layer_size([layer]), quantized_alone=False)
                product = replace(layer_work(layer).product, packed=False)
                counts = found.setdefault(size.key, CountedLayer(size=size, product=product, counts={})).counts
                counts[name] = counts.get(name, 0) + 1
    return found


def choices(product: Product) -> Iterator[tuple[str, Tile]]:
    """Every way to store the weights with every tile that such a layer may have."""
    gpu = gpu_for(torch.cuda.get_device_capability())
    for weights in WEIGHTS:
        for tile in layer_tiles(replace(product, packed=weights == "int4"), gpu):
            yield weights, tile


def complete(row: Mapping[str, Any] | None, layer: CountedLayer) -> bool:
    """Whether a row has the times of all tiles that the tables have now."""
    return row is not None and all(
        f"{WEIGHTS[weights]} {tile}" in row["microseconds"] for weights, tile in choices(layer.product)
    )


def compile_ahead(layers: Sequence[CountedLayer]) -> None:
    """Fill Triton's cache by one process a core: compiling one kernel after another would take the longest."""
    jobs = [(layer.size, *choice) for layer in layers for choice in choices(layer.product)]
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(tqdm(pool.map(run_once, jobs, chunksize=4), total=len(jobs), desc="compiling", disable=None))


def run_once(job: tuple[LayerSize, str, Tile]) -> None:
    size, weights, tile = job
    with torch.inference_mode():
        runs, _ = layer_runs(replace(size, weights=weights), {"it": ("triton", tile)}, torch.device("cuda"))
        runs["it"]()
        torch.cuda.synchronize()


def timed(layer: CountedLayer) -> dict[str, Any]:
    device = torch.device("cuda")
    names, runs = [], []
    carrier = None
    with torch.inference_mode():
        for weights, tile in choices(layer.product):
            found, carrier = layer_runs(replace(layer.size, weights=weights), {"it": ("triton", tile)}, device)
            names.append(f"{WEIGHTS[weights]} {tile}")
            runs.append(found["it"])
        assert carrier is not None
        seconds = gpu_kernel_seconds([*runs, carrier])
    return {
        "rows": layer.product.rows,
        "weight": list(layer.size.weight_shapes[0]),
        "microseconds": {name: round(1e6 * value, 2) for name, value in zip([*names, VENDOR], seconds, strict=True)},
    }


def page(results: Mapping[str, Any]) -> str:
    lines = [
        "# Layers on the GPU, by block shape",
        "",
        "Written by `python benchmarks/cuda_tiles.py sd15 sdxl --out docs/results-cuda-tiles.json`: layers of Stable",
        f"Diffusion 1.5 (64 x 64 latents) and XL (128 x 128), batch 2, on {results['device']}. us of one kernel, bias",
        "added, fp16 out; the vendor's is PyTorch's convolution or linear in fp16. `of the peak` is the share of an",
        "H100's int8 peak. Shapes of a tile are rows x outputs x depth.",
        *([results["remark"]] if "remark" in results else []),
        "",
    ]
    rows = sorted(results["layers"].values(), key=lambda row: -_total(row, VENDOR))
    for name in ("sd15", "sdxl"):
        own = [row for row in rows if row["counts"].get(name)]
        if own:
            sums = {
                kind: sum(row["counts"][name] * _best(row, kind)[1] for row in own) for kind in (VENDOR, "W8", "W4")
            }
            ours = ", ".join(
                f"{sums[kind] / 1e3:.2f} ({sums[VENDOR] / sums[kind]:.2f}x) at {kind}A8" for kind in ("W8", "W4")
            )
            timed_layers = sum(row["counts"][name] for row in own)
            lines.append(
                f"- {name}: {timed_layers} of {results['counts'][name]} layers, {len(own)} sizes, together "
                f"{sums[VENDOR] / 1e3:.2f} ms in fp16, {ours}, each with its fastest tile."
            )
    lines += [
        "",
        "| rows | weight | in sd15, sdxl | fp16 us | W8A8 us | against fp16 | of the peak | tile | W4A8 us "
        "| against fp16 | tile |",
        "|---:|---|---|---:|---:|---:|---:|---|---:|---:|---|",
    ]
    for row in rows:
        vendor = row["microseconds"][VENDOR]
        (tile, w8), (tile4, w4) = _best(row, "W8"), _best(row, "W4")
        share = 2 * row["rows"] * prod(row["weight"]) / w8 / (1e6 * GPUS[(9, 0)].int8_tops)
        counts = ", ".join(str(row["counts"].get(name, 0)) for name in ("sd15", "sdxl"))
        lines.append(
            f"| {row['rows']} | {'x'.join(map(str, row['weight']))} | {counts} | {vendor:.1f} | {w8:.1f} | "
            f"{vendor / w8:.2f}x | {share:.0%} | {tile} | {w4:.1f} | {vendor / w4:.2f}x | {tile4} |"
        )
    return "\n".join(lines) + "\n"


def _best(row: Mapping[str, Any], kind: str) -> tuple[str, float]:
    """The fastest tile of a kind and its microseconds; of fp16, the vendor's kernel."""
    found = [
        (name.removeprefix(f"{kind} "), value) for name, value in row["microseconds"].items() if name.startswith(kind)
    ]
    return min(found, key=lambda item: item[1])


def _total(row: Mapping[str, Any], kind: str) -> float:
    return float(sum(row["counts"].values()) * _best(row, kind)[1])


if __name__ == "__main__":
    main()
