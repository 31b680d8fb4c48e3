"""The page of latency_cuda.py: a table an architecture, where a step goes, the kernels of each arm of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

BASELINE = "fp16 compile"

KERNELS: Mapping[str, str] = {
    r"^(implicit|image)_gemm|^rescale": "integer layers",
    r"^attention": "integer attention",
    r"flash|fmha|sdpa": "fp16 attention",
    r"^triton_(poi|red|per|for)": "elementwise and reductions",
    r"^triton_tem|gemm|conv|xmma|cutlass|nvjet|cudnn|splitK": "fp16 and int32 matmuls, convolutions",
}
"""What a kernel is, by the first pattern that its name matches; the others are "others"."""


def page(results: Mapping[str, Any]) -> str:
    lines = [
        "# Latency on the GPU",
        "",
        "Written by `python benchmarks/latency_cuda.py sd15 sdxl --out docs/results-cuda.json` (`make gpu`): one UNet",
        "step, random weights, arms interleaved in one process, medians. Ours are loaded from a saved model,",
        "in an fp16 carrier; `autotuned` ones with kernels by timings, others by the performance model. Peak memory is",
        "that of one step with the arm's weights. A kernel's time is that of its replays in a CUDA graph.",
        "SQNR is against compiled fp16 on one random input without calibration data. A heading with arms was measured",
        "with `--arms`, each beside its own baseline; its last word is torch.compile's mode (`--mode`).",
    ]
    for name, case in results.items():
        heading = f"## {name}, batch {case['batch']}, on {case['device']}, torch {case['torch']}, {case['mode']}"
        lines += [
            "",
            heading,
            "",
            "| arm | ms a step | against compiled fp16 | weights, MB | of fp16 | peak memory, MB | SQNR, dB |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        base = case["arms"][BASELINE]["weights"] or 1
        for label, arm in case["arms"].items():
            quality = "" if arm["sqnr_db"] is None else f"{arm['sqnr_db']:.1f}"
            lines.append(
                f"| {label} | {arm['milliseconds']:.2f} | {arm['speed']:.2f}x | {arm['weights'] / 1e6:.0f} | "
                f"{arm['weights'] / base:.2f}x | {arm['peak'] / 1e6:.0f} | {quality} |"
            )
        lines += [f"\n{label} failed: `{' '.join(error.split())[:300]}`" for label, error in case["errors"].items()]
        lines += kernel_table(case["kernels"])
        for label, rows in case["layers"].items():
            lines += [
                "",
                f"### {label}: kernels, longest first",
                "",
                "| layer | rows x outputs x depth | kernel | count | us | floor us | of the roofline | 10^12 op/s |",
                "|---|---|---|---:|---:|---:|---:|---:|",
            ]
            for row in sorted(rows, key=lambda row: -row["count"] * row["seconds"]):
                lines.append(
                    f"| {row['kind']} | {row['shape']} | {row['kernel']} | {row['count']} | "
                    f"{1e6 * row['seconds']:.1f} | {1e6 * row['floor']:.1f} | {row['floor'] / row['seconds']:.0%} | "
                    f"{row['operations'] / row['seconds'] / 1e12:.1f} |"
                )
    return "\n".join(lines) + "\n"


def kernel_table(kernels: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Where the steps of the arms go, by kind of kernel."""
    if not any(kernels.values()):
        return []
    kinds = [*KERNELS.values(), "others"]
    lines = [
        "",
        "Kernels of one step, us together (number), from a profile:",
        "",
        f"| arm | {' | '.join(kinds)} | all |",
        f"|---|{'---:|' * (len(kinds) + 1)}",
    ]
    for label, found in kernels.items():
        cells = []
        for kind in kinds:
            own = [entry for name, entry in found.items() if kernel_kind(name) == kind]
            cells.append(f"{1e6 * sum(entry[1] for entry in own):.0f} ({sum(entry[0] for entry in own):.0f})")
        cells.append(f"{1e6 * sum(entry[1] for entry in found.values()):.0f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def kernel_kind(name: str) -> str:
    """Which of KERNELS' kinds a kernel is."""
    return next((kind for pattern, kind in KERNELS.items() if re.search(pattern, name)), "others")
