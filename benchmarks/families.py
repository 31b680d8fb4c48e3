"""Every architecture at its real size, random weights: what is found, how long, how large, how much memory, how exact.

    python benchmarks/families.py ddpm-cifar10 sd-1.5 --out docs/results-families.json

Each run is a process of its own, one after the other; runs that the JSON holds are kept unless --again is given, and
the table is written beside it as .md (with no family named, from what the JSON holds). Peak memory is the resident
set's, reset before each stage (Linux). Random weights show structure, memory and speed; what quantization costs a
trained model is measured on the bundled ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import qdiff_fx
from qdiff_fx.graph.capture import CapturedGraph, capture
from qdiff_fx.graph.edit import shared_copy
from qdiff_fx.kernels.machine import describe_machine
from qdiff_fx.report.documents import stored_bytes
from qdiff_fx.report.inspection import inspect_prepared
from qdiff_fx.report.tables import file_size
from qdiff_fx.safe_io import read_json, write_bytes, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from families import fill
from real_families import CONFIGS, real_call

LEVELS = (999.0, 500.0, 20.0)
"""Noise levels that are observed; the output is compared on others."""
QUICK: Mapping[str, Any] = {
    "weight_observer": "minmax",
    "activation_observer": "minmax",
    "weight_slack": 0.0,
    "activation_slack": 0.0,
    "equalize": False,
}
STAGES = ("build", "prepare", "calibrate", "convert", "save", "load", "run")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured run.

    Args:
      family: a key of FAMILIES.
      preset: of the quantization.
      side: height and width of the sample.
      rows: calibration samples, in batches of at most 2.
      dtype: of the model.
      default: with the preset's own searches and decisions, not the quickest config.
      equal: compare captured graph and module, which needs both to run.
    """

    family: str
    preset: str
    side: int
    rows: int = 6
    dtype: str = "float32"
    default: bool = False
    equal: bool = True

    @property
    def key(self) -> str:
        """What names the run in the JSON."""
        kind = "default" if self.default else "quick"
        return f"{self.family} {self.preset} {self.side} {self.rows} {self.dtype} {kind}"


FAMILIES: Mapping[str, tuple[int, str]] = {
    "ddpm-cifar10": (32, "float32"),
    "ddpm-church": (64, "float32"),
    "ldm-unconditional": (32, "float32"),
    "ldm-church": (32, "float32"),
    "class-conditional-imagenet64": (32, "float32"),
    "sd-1.5": (32, "float32"),
    "sd-1.5-inpainting": (32, "float32"),
    "sd-1.5-with-controlnet-residuals": (32, "float32"),
    "sd-1.5-with-ip-adapter": (32, "float32"),
    "controlnet-sd-1.5": (32, "float32"),
    "sd-2.1": (32, "float32"),
    "sdxl": (32, "bfloat16"),
}
"""Side of the sample that is run, and the type of the weights."""

MEMORY = (
    Run(family="sd-1.5", preset="w4a8", side=64, rows=2, default=True, equal=False),
    Run(family="sdxl", preset="w4a32", side=32, rows=0, dtype="bfloat16", equal=False),
    Run(family="sdxl", preset="w4a8", side=32, rows=16, dtype="bfloat16", equal=False),
)
"""Runs for memory alone: the preset's own decisions, or calibration samples, at sizes where they matter."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, "memory", "memory-sd", []], metavar="FAMILY")
    parser.add_argument("--out", type=Path, help="JSON file; the table is written beside it")
    parser.add_argument("--presets", nargs="+", choices=("w8a8", "w4a8"), default=("w8a8", "w4a8"))
    parser.add_argument("--rows", type=int, default=6, help="calibration samples (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure again what the file holds already")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(measure(Run(**json.loads(arguments.child)))))
        return
    results = read_json(arguments.out) if arguments.out.exists() else {}
    if results:
        write_bytes(arguments.out.with_suffix(".md"), table(results).encode())
    for run in (run for name in arguments.families for run in runs_of(name, arguments.presets, arguments.rows)):
        if run.key in results and not arguments.again:
            continue
        command = [sys.executable, __file__, "--child", json.dumps(asdict(run))]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            print(f"{run.key}: failed\n{finished.stderr[-3000:]}", file=sys.stderr, flush=True)
            continue
        results[run.key] = json.loads(finished.stdout.splitlines()[-1])
        write_json(arguments.out, results)
        write_bytes(arguments.out.with_suffix(".md"), table(results).encode())
        print(f"{run.key}: {results[run.key]['seconds']}", flush=True)


def runs_of(name: str, presets: Iterable[str], rows: int) -> Iterator[Run]:
    if name.startswith("memory"):
        yield from (run for run in MEMORY if name == "memory" or run.family == "sd-1.5")
        return
    side, dtype = FAMILIES[name]
    for preset in presets:
        yield Run(family=name, preset=preset, side=side, rows=rows, dtype=dtype, equal=preset == "w8a8")


def measure(run: Run) -> dict[str, Any]:
    """One run through all stages; the full-precision model goes as soon as it is not needed."""
    torch.manual_seed(0)
    record: dict[str, Any] = {"run": asdict(run), "machine": describe_machine(), "seconds": {}, "peak_gib": {}}
    folder = Path(tempfile.mkdtemp(prefix="families-"))
    try:
        _measure(run, record, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return record


def _measure(run: Run, record: dict[str, Any], folder: Path) -> None:
    dtype = getattr(torch, run.dtype)
    with stage(record, "build"):
        model = build(run.family, dtype)
    record["parameters"] = sum(item.numel() for item in model.parameters())
    call = real_call(run.family, model)
    calls = [fill(call, LEVELS[i % 3], i, batch=2, height=run.side, width=run.side) for i in range(-(-run.rows // 2))]
    held = [fill(call, level, 100 + i, batch=1, height=run.side, width=run.side) for i, level in enumerate((800, 300))]
    with torch.no_grad():
        exact = [first(model(*args, **kwargs, return_dict=False)).float() for args, kwargs in held]
    kept: list[CapturedGraph] = []

    def timed(*args: Any, **kwargs: Any) -> CapturedGraph:
        started = time.perf_counter()
        captured = capture(*args, **kwargs)
        record["capture_seconds"] = time.perf_counter() - started
        record["nodes"] = len(captured.graph_module.graph.nodes)
        if run.equal:
            kept.append(
                CapturedGraph(
                    graph_module=shared_copy(captured.graph_module),
                    signature=captured.signature,
                    output=captured.output,
                )
            )
        return captured

    config = qdiff_fx.QDiffConfig.preset(run.preset, **({} if run.default else QUICK))
    with stage(record, "prepare"), patch("qdiff_fx.api.capture", timed):
        prepared = qdiff_fx.prepare(model, config, example_inputs=call[0], example_kwargs=call[1])
    if kept:
        record["capture_max_error"] = capture_error(kept.pop(), held, exact)
    del model
    gc.collect()
    inspection = inspect_prepared(prepared)
    record["found"] = {
        "shortcuts": len(inspection.shortcuts),
        "attentions": len(inspection.attentions),
        "layers": len(inspection.layers),
        "blocks": len(inspection.blocks),
    }
    with stage(record, "calibrate"):
        if calls:
            report = qdiff_fx.calibrate(prepared, calls, batch_size=2, progress=False)
            record["quality"] = report.quality
    with stage(record, "convert"):
        quantized = qdiff_fx.convert(prepared, release=True)
    with stage(record, "save"):
        qdiff_fx.save(quantized, folder)
    record["stored_bytes"] = stored_bytes(folder)
    record["backend"] = quantized.backend
    del quantized, prepared
    gc.collect()
    with stage(record, "load"):
        loaded = qdiff_fx.load(folder)
    with stage(record, "run"), torch.no_grad():
        seen = [first(loaded(*args, **kwargs, return_dict=False)).float() for args, kwargs in held]
    record["sqnr_db"] = decibels(exact, seen)


def build(family: str, dtype: torch.dtype) -> nn.Module:
    """The architecture with default initialisation, created in `dtype`; ControlNet's zero convolutions get values."""
    kind, config, _, _ = CONFIGS[family]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: nn.Module = kind(**config).eval()
    finally:
        torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        if name.startswith("controlnet_") and name.endswith("weight") and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def capture_error(captured: CapturedGraph, held: list[Any], exact: list[torch.Tensor]) -> float:
    """The largest difference of the captured graph's output from the module's."""
    worst = 0.0
    with torch.no_grad():
        for (args, kwargs), wanted in zip(held, exact, strict=True):
            seen = captured.graph_module(*captured.signature.flatten(args, kwargs))
            worst = max(worst, float((first(seen).float() - wanted).abs().max()))
    return worst


@contextmanager
def stage(record: dict[str, Any], name: str) -> Iterator[None]:
    """Time a stage and take the peak of its resident set."""
    gc.collect()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    started = time.perf_counter()
    yield
    record["seconds"][name] = round(time.perf_counter() - started, 1)
    status = Path("/proc/self/status").read_text() if clear.exists() else ""
    peak = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
    record["peak_gib"][name] = round(peak / 2**20, 2)


def first(outputs: Any) -> torch.Tensor:
    """The first tensor of nested outputs."""
    result: torch.Tensor = torch.utils._pytree.tree_leaves(outputs)[0]
    return result


def decibels(exact: list[torch.Tensor], seen: list[torch.Tensor]) -> float:
    signal = sum(float(item.double().square().sum()) for item in exact)
    noise = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(exact, seen, strict=True))
    return float("inf") if noise == 0 else float(10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))


def table(results: Mapping[str, Any]) -> str:
    """The page: one row a family, then one a run that was made for its memory."""
    runs = [(Run(**record["run"]), record) for record in results.values()]
    machine = next(iter(results.values()))["machine"]
    lines = [
        "# Architectures at real size",
        "",
        "Written by `python benchmarks/families.py FAMILY ... --out docs/results-families.json`: public configs,",
        f"random weights, one process a run, {machine['threads']} thread(s) of {machine['processor']}",
        f"({machine['isa']}), torch {machine['torch']}.",
        "Sizes and SQNR with min-max grids and no raises; SQNR of the W8A8 output, run by integer kernels, against the",
        "full-precision one on noise at two noise levels that calibration did not see. Random weights: the figure",
        "shows that nothing broke, not what a trained model loses. In rows from before x86 had a kernel for it",
        "(docs/decisions/013) attention ran in the carrier type; the last column is `calibrate`'s own figure, pooled,",
        "with 8-bit q, k, v and probabilities simulated:",
        "untrained attention is flat, and over 1,024 keys its probabilities are below half a step of 1/255: zero.",
        "`calibrate` keeps such attentions in the carrier type by now; rows of 10 to 20 dB are from before it did.",
        "A LoRA that is fused changes values and no structure: its row is that of the network. Seconds are of the wall",
        "clock; some rows shared their core with other programs, so read them as upper bounds.",
        "",
        "| family | M parameters | weights | sample | nodes | capture, s | max error | shortcuts | attentions |"
        " layers | blocks | full | W8 | W4 | W8A8 SQNR, dB | with its attention, dB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in FAMILIES:
        pair = {run.preset: (run, item) for run, item in runs if run.family == name and _in_table(run)}
        if "w8a8" not in pair:
            continue
        run, item = pair["w8a8"]
        found = item["found"]
        full = file_size(item["parameters"] * (2 if run.dtype == "bfloat16" else 4))
        four = file_size(pair["w4a8"][1]["stored_bytes"]) if "w4a8" in pair else "–"
        lines.append(
            f"| {name} | {item['parameters'] / 1e6:.1f} | {run.dtype} | {run.side}×{run.side} | {item['nodes']} | "
            f"{item['capture_seconds']:.1f} | {item['capture_max_error']:g} | {found['shortcuts']} | "
            f"{found['attentions']} | {found['layers']} | {found['blocks']} | {full} | "
            f"{file_size(item['stored_bytes'])} | {four} | {item['sqnr_db']:.1f} | "
            f"{item['quality']['pooled_db']:.1f} |"
        )
    lines += [
        "",
        "## Peak memory of each stage",
        "",
        "Resident set in GiB; torch and its libraries alone are about 0.5. The full-precision model is there from",
        "`build` on and is let go after `prepare`, which shares its tensors; `convert(release=True)` frees each weight",
        "as it is packed. Calibration inputs are batches of 2, at three noise levels from 6 samples on. `load` and",
        "`run` follow in the same process, whose allocator may still hold what `convert` freed; loading alone peaks",
        "under a third of the full-precision weights in fp32 (tests/test_load_memory.py).",
        "",
        f"| run | samples | searches | {' | '.join(STAGES)} | seconds, prepare to save |",
        f"|---|---|---|{'---|' * len(STAGES)}---|",
    ]
    for run, item in sorted(runs, key=lambda pair: pair[1]["parameters"]):
        label = f"{run.family} {run.preset.upper()} {run.dtype}, {run.side}×{run.side}"
        peaks = " | ".join(f"{item['peak_gib'].get(name, 0):.1f}" for name in STAGES)
        seconds = sum(item["seconds"][name] for name in ("prepare", "calibrate", "convert", "save"))
        kind = "the preset's" if run.default else "min-max"
        lines.append(f"| {label} | {run.rows or 'none'} | {kind} | {peaks} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _in_table(run: Run) -> bool:
    return not run.default and run.side == FAMILIES[run.family][0]


if __name__ == "__main__":
    main()
