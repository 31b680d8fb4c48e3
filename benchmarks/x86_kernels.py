"""Integer layers on our own VNNI kernels and on oneDNN's, attention on ours and on torch's: what a call takes.

    OMP_NUM_THREADS=1 python benchmarks/x86_kernels.py --out docs/results-x86-kernels.json

Shapes of the bundled models, DDPM CIFAR-10 and Stable Diffusion 1.5 at batch 2; bf16 is written; calls are interleaved.
oneDNN's weights are packed for the very shape. Attention is compared with scaled_dot_product_attention in bf16. The
tables are written beside the JSON as .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from provenance import origin
from qdiff_fx.autotune.timer import interleaved, processor_seconds
from qdiff_fx.kernels import x86_calls
from qdiff_fx.kernels.x86_calls import KernelCall, conv2d_call, linear_call
from qdiff_fx.kernels.x86_vnni import load_vnni
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
HEADER = ("layer", "bf16, us", "oneDNN, us", "ours, us", "bf16 takes", "oneDNN takes", "ours, GOPS")
ATTENTION_HEADER = (
    "attention",
    "bf16, us",
    "8 bits, us",
    "16 bits, us",
    "bf16 takes",
    "bf16 off by",
    "8 bits off by",
    "16 bits off by",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if not load_vnni():
        parser.error("this CPU has no AVX512-VNNI, or there is no C++ compiler")
    torch.manual_seed(0)
    rows = [measure_conv(*case) for case in CONVS] + [measure_linear(*case) for case in LINEARS]
    attentions = [measure_attention(*case) for case in ATTENTIONS]
    results = {"rows": rows, "attentions": attentions} | origin(0)
    write_json(arguments.out, results)
    text = table(results)
    write_bytes(arguments.out.with_suffix(".md"), text.encode())
    print(text)


def measure_conv(channels: int, side: int, outputs: int, kernel: int, stride: int) -> dict[str, Any]:
    shape, padding = [2, channels, side, side], kernel // 2
    x = torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-127, 128, (outputs, channels, kernel, kernel), dtype=torch.int8)
    geometry = ([stride, stride], [padding, padding], [1, 1], 1)
    operands = (weight, torch.rand(outputs), torch.rand(outputs), 0.1, 7, geometry, shape, torch.bfloat16)
    name = f"conv {kernel}x{kernel}, {channels} to {outputs}, {side}x{side}" + (", stride 2" if stride == 2 else "")
    image, filters = (item.to(torch.bfloat16, memory_format=torch.channels_last) for item in (x, weight))
    carrier = partial(torch.nn.functional.conv2d, image, filters, stride=stride, padding=padding)
    return measure(name, x, partial(conv2d_call, *operands), carrier, channels * kernel * kernel)


def measure_linear(rows: int, features: int, outputs: int) -> dict[str, Any]:
    x = torch.randint(0, 256, (rows, features), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (outputs, features), dtype=torch.int8)
    operands = (weight, torch.rand(outputs), torch.rand(outputs), 0.1, 7, torch.bfloat16)
    carrier = partial(torch.nn.functional.linear, *(item.to(torch.bfloat16) for item in (x, weight)))
    name = f"linear, {rows} rows, {features} to {outputs}"
    return measure(name, x, partial(linear_call, *operands), carrier, features)


def measure(
    name: str, x: torch.Tensor, make: Callable[[], KernelCall], carrier: Callable[[], torch.Tensor], depth: int
) -> dict[str, Any]:
    calls: list[KernelCall] = []
    for own in (False, True):
        with patch.object(x86_calls, "vnni_available", lambda own=own: own):
            calls.append(make())
    with torch.inference_mode():
        runs = [carrier, lambda: calls[0](x), lambda: calls[1](x)]
        bf16, onednn, ours = interleaved(runs, processor_seconds, warm_up=5, least=15, budget=0.75)
        operations = 2 * calls[1](x).numel() * depth
    times = {"bf16_us": 1e6 * bf16, "onednn_us": 1e6 * onednn, "ours_us": 1e6 * ours}
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
    machine = results["machine"]
    cells = [
        [
            row["layer"],
            f"{row['bf16_us']:.0f}",
            f"{row['onednn_us']:.0f}",
            f"{row['ours_us']:.0f}",
            f"{row['bf16_us'] / row['ours_us']:.2f}x",
            f"{row['onednn_us'] / row['ours_us']:.2f}x",
            f"{row['operations'] / row['ours_us'] / 1e3:.0f}",
        ]
        for row in results["rows"]
    ]
    attentions = [
        [
            row["attention"],
            *(f"{time:.0f}" for time in row["us"].values()),
            f"{row['us']['bf16'] / row['us']['8 bits']:.2f}x",
            *(f"{100 * error:.2f} %" for error in row["errors"].values()),
        ]
        for row in results["attentions"]
    ]
    return (
        "# Integer layers and attention on x86: our kernels, oneDNN's and torch's\n\n"
        f"Written by `{results['command']}` (commit `{results['commit']}`; {machine['processor']}, {machine['isa']}, "
        f"{machine['threads']} thread(s), torch "
        f"{machine['torch']}): medians of interleaved calls, bf16 written, weights packed for the shape; bf16: torch's "
        "operators on bf16 operands. GOPS count a "
        f"multiplication and an addition as two.\n\n{markdown_table(HEADER, cells, numeric=range(1, len(HEADER)))}\n\n"
        "## Attention\n\nOurs turns operands into bytes and makes probabilities of 8 bits on a grid of their row, or "
        "of 16; bf16 is torch's scaled_dot_product_attention on the same operands. Off by: the result's error against "
        "float32 attention on them, relative to its norm.\n\n"
        f"{markdown_table(ATTENTION_HEADER, attentions, numeric=range(1, len(ATTENTION_HEADER)))}\n"
    )


if __name__ == "__main__":
    main()
