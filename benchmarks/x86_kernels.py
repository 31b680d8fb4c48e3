"""Integer layers on our own kernels and on oneDNN's, attention on ours and on torch's: what a call takes.

    OMP_NUM_THREADS=1 python benchmarks/x86_kernels.py --out docs/results-x86-kernels.json
    OMP_NUM_THREADS=1 python benchmarks/x86_kernels.py --kernels avx2 --out docs/results-x86-kernels-avx2.json

Shapes of the bundled models, DDPM CIFAR-10 and Stable Diffusion 1.5 at batch 2; calls are interleaved. torch's
operators run in the type that the CPU multiplies fastest, bf16 or else float32, which is also what is written.
oneDNN's weights are packed for the very shape; its sums saturate on CPUs without VNNI, and the table says so. The
tables are written beside the JSON as .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from provenance import origin
from qdiff_fx.autotune.timer import interleaved, processor_seconds
from qdiff_fx.kernels import x86
from qdiff_fx.kernels.machine import instruction_sets
from qdiff_fx.kernels.x86 import KernelCall, conv2d_call, linear_call
from qdiff_fx.kernels.x86_native import AVX2, VNNI, NativeKernels, load_kernels
from qdiff_fx.report.tables import markdown_table
from qdiff_fx.safe_io import write_bytes, write_json

CONVS = (
    (32, 28, 32, 3, 1),
    (32, 28, 64, 3, 2),
    (96, 28, 32, 1, 1),
    (64, 14, 64, 3, 1),
    (96, 7, 96, 3, 1),
    (96, 7, 96, 1, 1),
    (128, 32, 128, 3, 1),
    (256, 16, 256, 3, 1),
    (256, 8, 256, 3, 1),
    (320, 32, 320, 3, 1),
    (640, 16, 640, 3, 1),
    (1280, 8, 1280, 3, 1),
    (320, 64, 320, 3, 1),
    (1920, 16, 640, 1, 1),
)
"""Channels, pixels a side, outputs, kernel, stride."""
LINEARS = (
    (2, 128, 128),
    (98, 96, 288),
    (512, 256, 256),
    (2, 1280, 1280),
    (2048, 320, 320),
    (512, 640, 5120),
    (128, 1280, 1280),
)
"""Rows, features, outputs."""
ATTENTIONS = (
    (4, 49, 10, 32),
    (4, 49, 49, 32),
    (1, 256, 256, 256),
    (8, 64, 64, 160),
    (8, 64, 77, 160),
    (8, 256, 256, 80),
    (8, 256, 77, 80),
    (8, 1024, 77, 40),
    (8, 1024, 1024, 40),
    (8, 4096, 77, 40),
    (8, 4096, 4096, 40),
)
"""Heads, queries, keys, head size."""
FLOATING = torch.bfloat16 if "avx512_bf16" in instruction_sets() else torch.float32
KERNELS = {kernels.name: kernels for kernels in (VNNI, AVX2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernels", choices=KERNELS, default=VNNI.name)
    arguments = parser.parse_args()
    kernels = KERNELS[arguments.kernels]
    if not load_kernels(kernels):
        parser.error(f"this CPU has no {kernels.needs}, or there is no C++ compiler")
    torch.manual_seed(0)
    rows = [measure_conv(kernels, *case) for case in CONVS] + [measure_linear(kernels, *case) for case in LINEARS]
    attentions = [measure_attention(*case) for case in ATTENTIONS] if "attention" in kernels.operators else []
    with patch.object(x86, "native_kernels", lambda: None):
        exact = x86.known_answers_hold()
    results = {
        "kernels": kernels.name,
        "floating": str(FLOATING).removeprefix("torch."),
        "onednn_exact": exact,
        "rows": rows,
        "attentions": attentions,
    }
    results |= origin(0)
    write_json(arguments.out, results)
    text = table(results)
    write_bytes(arguments.out.with_suffix(".md"), text.encode())
    print(text)


def measure_conv(
    kernels: NativeKernels, channels: int, side: int, outputs: int, kernel: int, stride: int
) -> dict[str, Any]:
    shape, padding = [2, channels, side, side], kernel // 2
    x = torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-127, 128, (outputs, channels, kernel, kernel), dtype=torch.int8)
    geometry = ([stride, stride], [padding, padding], [1, 1], 1)
    others = (torch.rand(outputs), torch.rand(outputs), 0.1, 7, geometry, shape, FLOATING)
    name = f"conv {kernel}x{kernel}, {channels} to {outputs}, {side}x{side}" + (", stride 2" if stride == 2 else "")
    image, filters = (item.to(FLOATING, memory_format=torch.channels_last) for item in (x, weight))
    carrier = partial(torch.nn.functional.conv2d, image, filters, stride=stride, padding=padding)
    return measure(kernels, name, x, weight, lambda weight: conv2d_call(weight, *others), carrier)


def measure_linear(kernels: NativeKernels, rows: int, features: int, outputs: int) -> dict[str, Any]:
    x = torch.randint(0, 256, (rows, features), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (outputs, features), dtype=torch.int8)
    others = (torch.rand(outputs), torch.rand(outputs), 0.1, 7, FLOATING)
    carrier = partial(torch.nn.functional.linear, *(item.to(FLOATING) for item in (x, weight)))
    name = f"linear, {rows} rows, {features} to {outputs}"
    return measure(kernels, name, x, weight, lambda weight: linear_call(weight, *others), carrier)


def measure(
    kernels: NativeKernels,
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    make: Callable[[torch.Tensor], KernelCall],
    carrier: Callable[[], torch.Tensor],
) -> dict[str, Any]:
    """Of `weight` [O, ...] int8 from -127 to 127 and, where 4 bits take another time, of an eighth of each."""
    arms = {"onednn_us": (None, weight), "ours_us": (kernels, weight)}
    if kernels.saturates:
        arms["ours_w4_us"] = (kernels, weight // 8)
    runs = [carrier]
    for chosen, integers in arms.values():
        with patch.object(x86, "native_kernels", lambda chosen=chosen: chosen):
            runs.append(partial(make(integers), x))
    with torch.inference_mode():
        seconds = interleaved(runs, processor_seconds, warm_up=5, least=15, budget=0.75)
        operations = 2 * runs[1]().numel() * weight[0].numel()
    times = {label: 1e6 * time for label, time in zip(("floating_us", *arms), seconds, strict=True)}
    return {"layer": name, **times, "operations": operations}


def measure_attention(heads: int, queries: int, keys: int, size: int) -> dict[str, Any]:
    """Operands are normally distributed and lie on 8-bit grids, which bf16 holds exactly.

    Ours is timed with three passes that turn operands into bytes, as they stand in a network.
    """
    shapes = [(2, heads, length, size) for length in (queries, keys, keys)]
    codes = [(torch.randn(shape) * 32 + 128).round().clamp(0, 255) for shape in shapes]
    real = [(item - 128) / 32 for item in codes]
    narrow, shifted = ([item.to(torch.bfloat16) for item in items] for items in (real, codes))
    attend = torch.nn.functional.scaled_dot_product_attention

    def ours(qmax: int) -> torch.Tensor:
        numbers = (size**-0.5 / 32**2, 1 / 32, [128, 128], qmax, torch.bfloat16)
        result: torch.Tensor = torch.ops.qdiff.vnni_attention(*(item.to(torch.uint8) for item in shifted), *numbers)
        return result

    runs = {"bf16": lambda: attend(*narrow), "8 bits": lambda: ours(255), "16 bits": lambda: ours(65535)}
    with torch.inference_mode():
        exact = attend(*real)
        times = interleaved(list(runs.values()), processor_seconds, warm_up=3, least=15, budget=1.0)
        errors = {name: float((run().float() - exact).norm() / exact.norm()) for name, run in runs.items()}
    name = f"{heads} heads of {size}, {queries} queries, {keys} keys"
    return {"attention": name, "us": dict(zip(runs, (1e6 * time for time in times), strict=True)), "errors": errors}


def table(results: Mapping[str, Any]) -> str:
    machine, floating = results["machine"], results["floating"]
    times = {"floating_us": floating, "onednn_us": "oneDNN" if results["onednn_exact"] else "oneDNN (wrong)"}
    ours = {"ours_us": "ours", "ours_w4_us": "ours, 4-bit weights"}
    ours = {key: label for key, label in ours.items() if key in results["rows"][0]}
    times |= ours
    rivals = {"floating_us": floating} | ({"onednn_us": "oneDNN"} if results["onednn_exact"] else {})
    header = ["layer", *(f"{label}, us" for label in times.values())]
    for label in ours.values():
        header += [*(f"{rival} over {label}" for rival in rivals.values()), f"{label}, GOPS"]
    cells = []
    for row in results["rows"]:
        cells.append([row["layer"], *(f"{row[key]:.0f}" for key in times)])
        for key in ours:
            cells[-1] += [f"{row[rival] / row[key]:.2f}x" for rival in rivals]
            cells[-1].append(f"{row['operations'] / row[key] / 1e3:.0f}")
    wrong = "" if results["onednn_exact"] else " oneDNN's sums saturate on this CPU: its time is that of wrong results."
    return (
        f"# Integer layers on x86: our kernels for {KERNELS[results['kernels']].needs}, oneDNN's and torch's\n\n"
        f"Written by `{results['command']}` (commit `{results['commit']}`; {machine['processor']}, {machine['isa']}, "
        f"{machine['threads']} thread(s), torch {machine['torch']}): medians of interleaved calls, {floating} written, "
        f"weights packed for the shape; {floating}: torch's operators on such operands. GOPS count a "
        f"multiplication and an addition as two.{wrong}\n\n"
        f"{markdown_table(header, cells, numeric=range(1, len(header)))}\n"
        f"{attention_table(results['attentions']) if results['attentions'] else ''}"
    )


def attention_table(rows: Iterable[Mapping[str, Any]]) -> str:
    names = ("bf16", "8 bits", "16 bits")
    header = ("attention", *(f"{name}, us" for name in names), "bf16 takes", *(f"{name} off by" for name in names))
    cells = [
        [
            row["attention"],
            *(f"{time:.0f}" for time in row["us"].values()),
            f"{row['us']['bf16'] / row['us']['8 bits']:.2f}x",
            *(f"{100 * error:.2f} %" for error in row["errors"].values()),
        ]
        for row in rows
    ]
    return (
        "\n## Attention\n\nOurs turns operands into bytes and makes probabilities of 8 bits on a grid of their row, or "
        "of 16; bf16 is torch's scaled_dot_product_attention on the same operands. Off by: the result's error against "
        "float32 attention on them, relative to its norm.\n\n"
        f"{markdown_table(header, cells, numeric=range(1, len(header)))}\n"
    )


if __name__ == "__main__":
    main()
