"""What the performance model predicts for Stable Diffusion's UNets: bytes and operations a layer, floors, choices.

    python benchmarks/cuda_model.py sd15 sdxl --out docs/results-cuda-model.json

No GPU is needed, and no weights. The page is written beside the JSON as .md; architectures already in the JSON are kept
unless they are named again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from architectures import ARCHITECTURES, BATCH, abstract_plan
from qdiff_fx.graph.meta import ATTENTION, LAYER, MODULE_PATH
from qdiff_fx.kernels import cuda_model
from qdiff_fx.kernels.cuda_gpu import GPUS
from qdiff_fx.kernels.cuda_model import AttentionWork, LayerWork
from qdiff_fx.passes.lower.cuda_attention import attention_work
from qdiff_fx.passes.lower.cuda_carrier import PREDICTED_MARGIN
from qdiff_fx.passes.lower.cuda_target import layer_work
from qdiff_fx.passes.lower.integer_layers import integer_layer
from qdiff_fx.safe_io import write_bytes, write_json

JUDGED = {"A100": GPUS[(8, 0)], "H100": GPUS[(9, 0)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="+", choices=list(ARCHITECTURES))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.architectures:
        results[name] = predict(name)
        write_json(arguments.out, results)
        write_bytes(arguments.out.with_suffix(".md"), page(results).encode())


def predict(name: str) -> dict[str, Any]:
    plan, _ = abstract_plan(name, "w8a8")
    layers: dict[str, dict[str, Any]] = {}
    attentions: dict[str, dict[str, Any]] = {}
    for node in plan.graph.nodes:
        if (layer := integer_layer(node)) is not None:
            kind = "linear" if not layer.is_conv2d else "conv {}x{}".format(*layer.weight_shape[2:])
            work, policy = layer_work(layer), LAYER.get(node)
            _count(layers, kind, _layer_entry(work), policy.name if policy else node.name)
        elif str(node.target) == "qdiff.attention.default":
            policy_name = ATTENTION.require(node).name if ATTENTION.get(node) else MODULE_PATH.get(node) or node.name
            _count(attentions, "attention", _attention_entry(attention_work(node)), policy_name)
    return {"batch": BATCH, "layers": list(layers.values()), "attentions": list(attentions.values())}


def _count(groups: dict[str, dict[str, Any]], kind: str, entry: dict[str, Any], name: str) -> None:
    key = f"{kind} {entry['shape']}"
    groups.setdefault(key, {"kind": kind, **entry, "count": 0, "first": name})["count"] += 1


def _layer_entry(work: LayerWork) -> dict[str, Any]:
    product = work.product
    packed = replace(work, product=replace(product, packed=True))
    entry: dict[str, Any] = {
        "shape": f"{product.rows} x {product.outputs * product.groups} x {product.depth * product.taps}"
        + (", quantized alone" if work.quantized_alone else ""),
        "operations": work.operations,
    }
    for label, gpu in JUDGED.items():
        arms = {
            "fp16": cuda_model.carrier_layer(work, gpu),
            "w8a8": cuda_model.integer_layer(work, gpu),
            "w4a8": cuda_model.integer_layer(packed, gpu),
            "int_mm": cuda_model.vendor_integer_layer(work, gpu),
        }
        entry |= {"bytes": {arm: estimate.bytes for arm, estimate in arms.items()}}
        entry[label] = {arm: vars(estimate) for arm, estimate in arms.items()}
    return entry


def _attention_entry(work: AttentionWork) -> dict[str, Any]:
    entry: dict[str, Any] = {"shape": f"{work.heads} heads, {work.queries} x {work.keys} x {work.head}"}
    for label, gpu in JUDGED.items():
        arms = {
            "fp16": cuda_model.carrier_attention(work, gpu),
            "int8": cuda_model.integer_attention(work, gpu),
        }
        entry[label] = {arm: vars(estimate) for arm, estimate in arms.items()}
    return entry


def page(results: Mapping[str, Any]) -> str:
    lines = [
        "# Performance model of the cuda backend",
        "",
        "Written by `python benchmarks/cuda_model.py sd15 sdxl --out docs/results-cuda-model.json`. Nothing here was",
        "measured, but for the times that its constants are fitted to: until a layer is timed, lowering goes by it",
        "(docs/decisions/031-cuda-performance-model.md).",
        "",
        "| GPU | int8, 10^12 op/s | fp16, 10^12 op/s | memory, GB/s | source |",
        "|---|---:|---:|---:|---|",
    ]
    for gpu in JUDGED.values():
        lines.append(f"| {gpu.name} | {gpu.int8_tops} | {gpu.fp16_tflops} | {gpu.bandwidth} | {gpu.source} |")
    lines += [
        "",
        "`floor` is the longer of operations at the dense peak and bytes at the memory's bandwidth. `predicted` is",
        "what the best block shape takes by its waves of blocks, in the carrier a constant and a share of the fp16",
        f"peak: {cuda_model.CARRIER_SHARE:.0%} in matmuls, {cuda_model.CARRIER_CONV_SHARE:.0%} in convolutions; at",
        f"least the bytes at {cuda_model.MEMORY_SHARE:.0%} of the bandwidth. An activation is read and an",
        "output written once; codes are written by the kernel before, except where that is another layer or an",
        "attention (`quantized alone`). Shapes are rows x outputs x depth.",
    ]
    for name, case in results.items():
        lines += ["", f"## {name}, batch {case['batch']}", ""]
        for label in JUDGED:
            totals = {
                arm: 1e3 * sum(item["count"] * _best(item[label], arm)["predicted"] for item in case["layers"])
                for arm in ("fp16", "w8a8", "w4a8")
            }
            floors = {
                arm: 1e3 * sum(item["count"] * item[label][arm]["floor"] for item in case["layers"]) for arm in totals
            }
            attention = 1e3 * sum(item["count"] * item[label]["fp16"]["predicted"] for item in case["attentions"])
            kept = [item for item in case["layers"] if _best(item[label], "w8a8") is item[label]["fp16"]]
            share = sum(item["count"] * item["operations"] for item in kept) / sum(
                item["count"] * item["operations"] for item in case["layers"]
            )
            lines += [
                f"- {label}, layers together, ms predicted (floor): fp16 {totals['fp16']:.2f} ({floors['fp16']:.2f}), "
                f"W8A8 {totals['w8a8']:.2f} ({floors['w8a8']:.2f}), W4A8 {totals['w4a8']:.2f} ({floors['w4a8']:.2f}): "
                f"{totals['fp16'] / totals['w8a8']:.2f}x. Attention in fp16 {attention:.2f}. "
                f"{sum(item['count'] for item in kept)} of {sum(item['count'] for item in case['layers'])} layers stay "
                f"in fp16 ({share:.1%} of the operations)."
            ]
        lines += [
            "",
            "| layer | shape | count | GOP | MB fp16 | MB W8A8 | MB W4A8 |"
            + "".join(
                f" {label} floor us: fp16 | W8A8 | W4A8 | predicted: fp16 | W8A8 | runs as |" for label in JUDGED
            ),
            "|---|---|---:|---:|---:|---:|---:|" + "---:|---:|---:|---:|---:|---|" * len(JUDGED),
        ]
        for item in sorted(case["layers"], key=lambda item: -item["count"] * item["operations"]):
            size = [f"{item['bytes'][arm] / 1e6:.2f}" for arm in ("fp16", "w8a8", "w4a8")]
            cells = [item["kind"], item["shape"], str(item["count"]), f"{item['operations'] / 1e9:.2f}", *size]
            for label in JUDGED:
                arms = item[label]
                cells += [f"{1e6 * arms[arm]['floor']:.1f}" for arm in ("fp16", "w8a8", "w4a8")]
                cells += [f"{1e6 * arms[arm]['predicted']:.1f}" for arm in ("fp16", "w8a8")]
                cells.append("fp16" if _best(arms, "w8a8") is arms["fp16"] else "int8")
            lines.append(f"| {' | '.join(cells)} |")
        lines += [
            "",
            "| attention | count |"
            + "".join(f" {label} predicted us: fp16 | int8 | int8 bound by |" for label in JUDGED),
            "|---|---:|" + "---:|---:|---|" * len(JUDGED),
        ]
        for item in case["attentions"]:
            cells = [item["shape"], str(item["count"])]
            for label in JUDGED:
                cells += [f"{1e6 * item[label][arm]['predicted']:.1f}" for arm in ("fp16", "int8")]
                cells.append(item[label]["int8"]["bound"])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _best(arms: Mapping[str, Any], arm: str) -> Any:
    """What lowering runs for a layer of that arm: in fp16 where that is clearly predicted to be faster."""
    carrier = arms["fp16"]["predicted"] <= PREDICTED_MARGIN * arms[arm]["predicted"]
    return arms["fp16"] if carrier else arms[arm]


if __name__ == "__main__":
    main()
