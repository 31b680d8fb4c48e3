"""The studies of benchmarks/results.py that draw few samples: calibration, error growth, ranges."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

import qdiff_fx
from qdiff_fx.allocation.units import weight_units
from qdiff_fx.calibration.driver import weight_quantizers
from qdiff_fx.evaluation import sample_ddim, trajectory_error
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.graph.meta import LAYER, SPLIT_PART
from qdiff_fx.report.documents import most_varying
from qdiff_fx.report.inspection import inspect_prepared
from qdiff_fx.safe_io import read_tensors, write_tensors
from qdiff_fx.stages import observe_and_fit

MODEL = "fashion-uncond"
PLAIN: Mapping[str, Any] = {
    "weight_slack": 0.0,
    "activation_slack": 0.0,
    "equalize": False,
    "bias_correction": False,
    "weight_observer": "minmax",
    "activation_observer": "minmax",
}
STRATEGIES, ROWS = ("first", "middle", "last", "normal", "uniform"), (4, 16, 64)
GROWTH_BITS, GROWTH_STEPS, GROWTH_IMAGES, GROWTH_SEED = (8, 5, 4), 100, 64, 7

Cell = Callable[[Any], dict[str, Any]]


def calibration(strategy: str, rows: int) -> Cell:
    """Activations at 8 bits alone, their ranges from these samples: what sampling of timesteps does."""

    def measure(bench: Any) -> dict[str, Any]:
        source = bench.source(MODEL)
        data = bench.calibration(MODEL, rows=rows, strategy=strategy)
        prepared = qdiff_fx.prepare(source.unet, qdiff_fx.QDiffConfig.preset("w8a8", **PLAIN))
        observe_and_fit(prepared, data, 32, None, False)
        prepared.set_mode(QuantizerMode.QUANTIZE)
        for quantizer, _ in weight_quantizers(prepared.graph_module):
            quantizer.mode = QuantizerMode.PASS
        measured = bench.yardstick(MODEL, 1.0).measure(prepared)
        return {
            "strategy": strategy,
            "rows": len(data),
            "pooled_db": measured.sqnr.pooled_db,
            "median_db": measured.sqnr.median_db,
            "endpoint_db": measured.psnr.median_db,
        }

    return measure


def growth(bits: int) -> Cell:
    """Error over DDIM-100 of weights rounded to nearest at `bits` with 8-bit activations."""

    def measure(bench: Any) -> dict[str, Any]:
        source = bench.source(MODEL)
        data = bench.calibration(MODEL)
        prepared = qdiff_fx.prepare(source.unet, qdiff_fx.QDiffConfig(**{**PLAIN, "weight_bits": bits}))
        observe_and_fit(prepared, data, 32, None, False)
        prepared.set_mode(QuantizerMode.QUANTIZE)
        exact, seen = _exact_steps(bench), _steps(bench, prepared)
        return {
            "bits": bits,
            "seed": GROWTH_SEED,
            "images": GROWTH_IMAGES,
            "errors": trajectory_error(exact, seen),
            "mse": [float((a - b).square().mean()) for a, b in zip(exact, seen, strict=True)],
        }

    return measure


def _steps(bench: Any, network: Any) -> tuple[torch.Tensor, ...]:
    source = bench.source(MODEL)
    noise = source.noise(GROWTH_IMAGES, GROWTH_SEED)
    return sample_ddim(
        network, source.require_scheduler(), noise, num_inference_steps=GROWTH_STEPS, keep_steps=True
    ).steps


def _exact_steps(bench: Any) -> tuple[torch.Tensor, ...]:
    """Full precision's, run once and kept in the work folder."""
    path = bench.work / "growth-full-precision.safetensors"
    if not path.is_file():
        write_tensors(path, {"steps": torch.stack(_steps(bench, bench.source(MODEL).unet))})
    return tuple(read_tensors(path)["steps"])


def activations(bench: Any) -> dict[str, Any]:
    """Ranges of every quantized activation by timestep."""
    prepared = qdiff_fx.prepare(bench.source(MODEL).unet, qdiff_fx.QDiffConfig.preset("w8a8", **PLAIN))
    report = qdiff_fx.calibrate(prepared, bench.calibration(MODEL), progress=False)
    ratios: dict[str, float] = {}
    # A tensor that several layers read through quantizers of their own (the time embedding) counts once.
    distinct = {json.dumps(row["by_timestep"]): row for row in reversed(report.quantizers)}
    for row in list(distinct.values())[::-1]:
        spans = [high - low for _, low, high in row["by_timestep"]]
        if len(spans) > 1 and min(spans) > 0:
            ratios[str(row["name"])] = max(spans) / min(spans)
    return {
        "tensors": len(ratios),
        "median_ratio": median(ratios.values()),
        "over_two": sum(ratio > 2 for ratio in ratios.values()),
        "largest": sorted(([name, ratio] for name, ratio in ratios.items()), key=lambda item: -item[1])[:5],
        "shown": most_varying(report.quantizers, 6),
    }


def shortcuts(bench: Any) -> dict[str, Any]:
    """Ranges of activations and weights of the parts of every shortcut."""
    prepared = qdiff_fx.prepare(bench.source(MODEL).unet, qdiff_fx.QDiffConfig.preset("w8a8", **PLAIN))
    observe_and_fit(prepared, bench.calibration(MODEL), 32, None, False)
    weights = {unit.name: unit.weight for unit in weight_units(prepared.graph_module)}
    parts: dict[str, list[list[float]]] = {}
    for node in prepared.graph_module.graph.nodes:
        policy = LAYER.get(node)
        if SPLIT_PART.get(node) is not None and policy is not None and policy.name in weights:
            weight = weights[policy.name].detach()
            edges = [float(weight.min()), float(weight.max())]
            parts.setdefault(policy.name.rpartition("#")[0], []).append(edges)
    return {"shortcuts": inspect_prepared(prepared).to_dict()["shortcuts"], "weights": parts}


STUDIES: Mapping[str, Cell] = {
    "activations": activations,
    "shortcuts": shortcuts,
    **{f"growth/{bits} bits": growth(bits) for bits in GROWTH_BITS},
    **{f"calibration/{strategy}/{rows}": calibration(strategy, rows) for rows in ROWS for strategy in STRATEGIES},
}
