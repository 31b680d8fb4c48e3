"""Quality targets on planted networks: what 15, 20 and 25 dB cost in bytes and time, beside all-W8A8 and no integers.

    OMP_NUM_THREADS=1 python benchmarks/targets.py --work /tmp/targets

Writes docs/results-targets.json and .md. A finished network is kept in the work folder: a killed run continues.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import qdiff_fx
from latency import BASELINE, BATCH, CARRIERS, describe, interleaved, isa, with_malloc_settings
from planting import CONSTANT, CONSTANT_RATIO, plant, samples
from provenance import origin
from qdiff_fx.allocation.units import input_units, total_multiplications
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.cli.sources import open_source
from qdiff_fx.errors import QDiffWarning
from qdiff_fx.evaluation import output_sqnr
from qdiff_fx.kernels.machine import instruction_sets
from qdiff_fx.report.documents import stored_bytes
from qdiff_fx.safe_io import read_json, write_bytes, write_json

MODEL, GUIDANCE = "fashion-uncond", 1.0
PLANTS = {CONSTANT: CONSTANT_RATIO, "residual stream": 1000}
"""What is planted, and its ratio."""

UNIFORM = {"weight_slack": 0.0, "activation_slack": 0.0}
"""The target alone decides."""

TARGETS = (15.0, 20.0, 25.0)
UNQUANTIZED = {"fp32 compile": torch.float32, BASELINE: torch.bfloat16}
RATIOS = ("ratio_to_fp32", "ratio_to_bf16")
"""What a row calls its time over theirs."""

SAMPLES_PER_TIMESTEP = 64
"""Of the calibration set: enough for a selection split of its own."""


def main() -> None:
    with_malloc_settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of finished networks")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--repeats", type=int, default=31)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", QDiffWarning)  # what the guard says is in the table
    kept = arguments.docs / "results-targets.json"
    found = read_json(kept) if kept.exists() else {}
    for planted, ratio in PLANTS.items():
        path = arguments.work / f"{planted.replace(' ', '-')}.json"
        if not path.exists():
            write_json(path, _measure(planted, ratio, arguments.work, arguments.repeats))
        found[planted] = read_json(path)
        write_json(kept, found)
        write_bytes(arguments.docs / "results-targets.md", _page(found).encode())


def _measure(planted: str, ratio: float, work: Path, repeats: int) -> dict[str, Any]:
    """Every arm on one planted network, then all of them in turns against the clock."""
    source = open_source(MODEL)
    data, held = samples(source, GUIDANCE, work, SAMPLES_PER_TIMESTEP)
    unet = copy.deepcopy(source.unet)
    plant(unet, planted, ratio, *held.gather(torch.arange(32)))
    args, _ = held.gather(torch.arange(BATCH))
    full_bytes = 4 * sum(parameter.numel() for parameter in unet.parameters())
    carrier = "bf16" if "avx512_bf16" in instruction_sets() else "fp32"
    dtype = CARRIERS[carrier]
    steps: dict[str, Callable[[], Tensor]] = {}
    arms: dict[str, dict[str, Any]] = {}
    configs = {f"target {target:g} dB": ("w4a8", {"target_sqnr": target}) for target in TARGETS}
    for label, (preset, settings) in {"all W4A8": ("w4a8", {}), **configs, "all W8A8": ("w8a8", {})}.items():
        model, arms[label] = _quantized(unet, preset, settings, data, held, full_bytes, dtype)
        arms[label] |= _lowered(unet, model, dtype, held)
        steps[label] = _step(model.compile(), args, dtype)
        print(planted, label, arms[label], flush=True)
    for label, unquantized in UNQUANTIZED.items():
        model = copy.deepcopy(unet).to(unquantized)
        arms[label] = {"share_of_fp32": unquantized.itemsize / 4, **_lowered(unet, model, unquantized, held)}
        steps[label] = _step(torch.compile(model, fullgraph=True), args, unquantized)
    with torch.no_grad():
        times = interleaved(steps, repeats)
    for label, row in arms.items():
        row["milliseconds"] = 1e3 * median(times[label])
        for baseline, name in zip(UNQUANTIZED, RATIOS, strict=True):
            row[name] = median(a / b for a, b in zip(times[label], times[baseline], strict=True))
    facts = {"ratio": ratio, "carrier": carrier, "calibration_rows": len(data), "heldout_rows": len(held)}
    return {**isa(), **origin(seed=0), **facts, "arms": arms}


def _quantized(
    unet: nn.Module,
    preset: str,
    settings: Mapping[str, Any],
    data: CalibrationSet,
    held: CalibrationSet,
    full_bytes: int,
    dtype: torch.dtype,
) -> tuple[qdiff_fx.QuantizedUNet, dict[str, Any]]:
    """(x86 model, what calibration decided and measured on `held`, which nothing was fitted or selected on)."""
    prepared = qdiff_fx.prepare(unet, qdiff_fx.QDiffConfig.preset(preset, **UNIFORM, **settings))
    report = qdiff_fx.calibrate(prepared, data, holdout=held, progress=False)
    integer = sum(unit.multiplications for unit in input_units(prepared.graph_module))
    share = 1.0 - integer / total_multiplications(prepared.graph_module)
    model = qdiff_fx.convert(prepared, backend="x86", dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        qdiff_fx.save(model, folder)
        size = stored_bytes(Path(folder))
    return model, {
        "reference_pooled_db": report.quality["pooled_db"],
        "reference_median_db": report.quality["median_db"],
        "share_of_fp32": size / full_bytes,
        "carrier_multiplications": share,
        "raises": sum(row["reason"].startswith("target:") for row in report.raises),
    }


def _lowered(unet: nn.Module, model: Any, dtype: torch.dtype, held: CalibrationSet) -> dict[str, float | None]:
    """SQNR of `model` as it runs, in `dtype`, against `unet` in fp32; None where they are equal."""

    def run(*args: Any, **kwargs: Any) -> Any:
        sample, *rest = args
        return model(sample.to(dtype), *rest, **kwargs)

    result = output_sqnr(unet, run, held.batches(32))
    figures = {"run_pooled_db": result.pooled_db, "run_median_db": result.median_db}
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _step(model: Any, args: tuple[Any, ...], dtype: torch.dtype) -> Callable[[], Tensor]:
    sample, *rest = args
    sample = sample.to(dtype)
    return lambda: model(sample, *rest, return_dict=False)[0]


def _page(found: Mapping[str, Any]) -> str:
    lines = [
        "# What a quality target costs on networks with planted outliers",
        "",
        f"Written by `benchmarks/targets.py` on `{MODEL}`: W4A8 without slacks, with channel factors, rounded to",
        "nearest, raised until the median over timesteps, the lower end of its 95 % interval, reaches the target.",
        "SQNR pooled / median, dB, on held-out rows that nothing was fitted or selected on: of the reference semantics",
        "with fp32 carrier, and as it runs on x86.",
        f"One step at batch {BATCH}, compiled, arms interleaved; ratios are medians of neighbouring runs'.",
    ]
    for planted, case in found.items():
        lines += [
            "",
            f"## {planted}, {case['ratio']:g}",
            "",
            f"{describe(case)}; {case['carrier']} carrier; {case['calibration_rows']} calibration rows, "
            f"{case['heldout_rows']} held-out rows; commit `{case['commit']}`.",
            "",
            "| arm | reference, dB | as it runs, dB | file, of fp32 | multiplications in the carrier | raises "
            "| ms a step | time, of fp32 | of bf16 |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_line(label, row) for label, row in case["arms"].items()),
        ]
    return "\n".join(lines) + "\n"


def _line(label: str, row: Mapping[str, Any]) -> str:
    quantized = "raises" in row
    cells = (
        label,
        f"{row['reference_pooled_db']:.1f} / {row['reference_median_db']:.1f}" if quantized else "–",
        " / ".join("∞" if row[name] is None else f"{row[name]:.1f}" for name in ("run_pooled_db", "run_median_db")),
        f"{row['share_of_fp32']:.3f}",
        f"{row['carrier_multiplications']:.1%}" if quantized else "100.0%",
        str(row["raises"]) if quantized else "–",
        f"{row['milliseconds']:.1f}",
        *(f"{row[name]:.2f}" for name in RATIOS),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
