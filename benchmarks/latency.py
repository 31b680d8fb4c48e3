"""Latency of one UNet step on the CPU: torch.compile in fp32 and bf16 against the converted model on the x86 backend.

    OMP_NUM_THREADS=1 python benchmarks/latency.py fashion ddpm-cifar10 --out docs/results-latency.json
    OMP_NUM_THREADS=1 python benchmarks/latency.py fashion --carriers fp32 --out docs/results-latency-avx2.json
    python benchmarks/latency.py --device cuda sd15 sdxl --out docs/results-cuda.json

All arms of a case run in one process, interleaved, under the same threads and malloc settings; medians, and medians of
the ratios of neighbouring runs. Cases already in the JSON are kept unless they are named again; the table is written
beside it as .md. Architectures other than the bundled ones have random weights: their latency is real, quality is not
asked for. `--device cuda` runs latency_cuda.py, which takes other arguments.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor

import peers
import qdiff_fx
from peak_memory import peaks
from qdiff_fx.assets import load_conditional, load_unconditional
from qdiff_fx.kernels.machine import instruction_sets
from qdiff_fx.safe_io import write_bytes, write_json
from roofline import achieved_gops

# Big outputs come from fresh pages otherwise, and page faults hide everything.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
BATCH = 2
BASELINE = "bf16 compile"
PEERS = (
    "NNCF int8 on OpenVINO, bf16",
    "ONNX Runtime int8",
    "torchao PT2E, X86InductorQuantizer",
    "SDNQ int8, dynamic int8 activations",
)
CARRIERS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def fashion() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    return load_unconditional().unet, {"sample": torch.randn(BATCH, 1, 28, 28)}


def fashion_conditional() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    pipe = load_conditional()
    return pipe.unet, {"sample": torch.randn(BATCH, 1, 28, 28), "encoder_hidden_states": pipe.context[:BATCH].float()}


def ddpm_cifar10() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """google/ddpm-cifar10-32: 35.7 M parameters."""
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        mid_block_scale_factor=1,
    )
    return unet.eval(), {"sample": torch.randn(BATCH, 3, 32, 32)}


def stable_diffusion(size: int, layers: int = 2) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """Stable Diffusion 1.5: 860 M parameters; with one layer a block the same widths and 560 M."""
    unet = UNet2DConditionModel(
        cross_attention_dim=768, attention_head_dim=8, sample_size=size, layers_per_block=layers
    )
    inputs = {"sample": torch.randn(BATCH, 4, size, size), "encoder_hidden_states": torch.randn(BATCH, 77, 768)}
    return unet.eval(), inputs


CASES: Mapping[str, Callable[[], tuple[torch.nn.Module, dict[str, Tensor]]]] = {
    "fashion": fashion,
    "fashion-conditional": fashion_conditional,
    "ddpm-cifar10": ddpm_cifar10,
    "sd15-one-layer-32": lambda: stable_diffusion(32, layers=1),
    "sd15-32": lambda: stable_diffusion(32),
    "sd15-64": lambda: stable_diffusion(64),
}


def main() -> None:
    if "--device" in sys.argv:
        on_device()
    with_malloc_settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=list(CASES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--presets", nargs="+", default=["w8a8", "w4a8"])
    parser.add_argument("--backends", nargs="+", choices=["x86", "openvino"], default=["x86"])
    parser.add_argument("--carriers", nargs="+", choices=list(CARRIERS), default=["bf16"])
    parser.add_argument("--autotune", action="store_true", help="also arms whose layers choose int8 or the carrier")
    parser.add_argument("--packages", action="store_true", help="also arms that are compiled ahead of time")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        default=(),
        metavar="NAME",
        help="also other tools' int8 networks (extra [peers]), all of them without a name",
    )
    parser.add_argument("--memory", action="store_true", help="also the peak memory of loading and one step")
    arguments = parser.parse_args()
    if arguments.peers == []:
        arguments.peers = PEERS
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.cases:
        torch.manual_seed(0)
        results[name] = measure(name, arguments)
        write_json(arguments.out, results)
        write_bytes(arguments.out.with_suffix(".md"), table(results).encode())


def on_device() -> None:
    """Take `--device cpu` off the command line; become latency_cuda.py for cuda."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    options, sys.argv[1:] = parser.parse_known_args()
    if options.device == "cuda":
        other = Path(__file__).with_name("latency_cuda.py")
        os.execv(sys.executable, [sys.executable, str(other), *sys.argv[1:]])


def with_malloc_settings() -> None:
    """Start this process again under MALLOC, unless it runs under it."""
    if any(os.environ.get(key) != value for key, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)


def give_back_memory() -> None:
    """What this process freed goes back to the system, which glibc leaves undone under MALLOC."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    module, inputs = CASES[name]()
    arms: dict[str, Callable[[], Tensor]] = {}
    timestep = torch.full((BATCH,), 500.0)

    def add(label: str, model: Any, dtype: torch.dtype) -> None:
        given = cast(inputs, dtype)
        sample, others = given.pop("sample"), given
        arms[label] = lambda: model(sample, timestep, return_dict=False, **others)[0]

    work = tempfile.TemporaryDirectory()
    folders: dict[str, Path] = {}
    roofline: Callable[[], dict[str, float]] | None = None
    for preset, carrier in itertools.product(options.presets, options.carriers):
        dtype, label = CARRIERS[carrier], f"{preset} {carrier}"
        folders[label] = Path(work.name, label)
        qdiff_fx.save(quantize(module, inputs, preset, dtype), folders[label])
        if "x86" in options.backends:
            plain = qdiff_fx.load(folders[label], "x86")
            if roofline is None:
                roofline = partial(achieved_gops, plain, {**cast(inputs, dtype), "timestep": timestep})
            add(label, plain.compile(), dtype)
            if options.packages:
                file = Path(work.name, f"{label}.pt2")
                add(f"{label} package", qdiff_fx.load(folders[label], "x86").package(file), dtype)
            if options.autotune:
                add(f"{label}, autotuned", qdiff_fx.load(folders[label], "x86", autotune=True).compile(), dtype)
        if "openvino" in options.backends:
            add(f"{label} openvino", qdiff_fx.load(folders[label], "openvino").compile(), dtype)
        give_back_memory()
    failed = {}
    for label in options.peers:
        try:
            add(label, peers.quantize(label, module, calls(inputs)), torch.float32)
            arms[label]()
        except Exception as error:  # whatever a tool raises is its result
            arms.pop(label, None)
            failed[label] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        print(f"{name}: {label} {failed.get(label, 'is ready')}", flush=True)
    add("fp32 compile", torch.compile(module, fullgraph=True), torch.float32)
    add(BASELINE, torch.compile(copy.deepcopy(module).to(torch.bfloat16), fullgraph=True), torch.bfloat16)
    with torch.no_grad():
        exact = module(**inputs, timestep=timestep, return_dict=False)[0]
        quality = {}
        for label, run in arms.items():
            started = time.perf_counter()
            quality[label] = decibels(exact, run())
            print(f"{name}: {label} compiled in {time.perf_counter() - started:.0f} s", flush=True)
        times = interleaved(arms, options.repeats)
    return isa() | {
        "batch": BATCH,
        "int8_matmul_gops": matmul_gops(),
        "achieved_gops": {} if roofline is None else roofline(),
        "failed": failed,
        "peak_bytes": peaks(module, inputs, folders) if options.memory else {},
        "arms": {
            label: {
                "milliseconds": 1e3 * median(times[label]),
                "speed_over_bf16": median(b / a for a, b in zip(times[label], times[BASELINE], strict=True)),
                "speed_over_fp32": median(b / a for a, b in zip(times[label], times["fp32 compile"], strict=True)),
                "sqnr_db": quality[label],
            }
            for label in ("fp32 compile", BASELINE, *(label for label in arms if "compile" not in label))
        },
    }


def calls(inputs: Mapping[str, Tensor]) -> peers.Calls:
    """Calibration data for the peers, like `quantize` has it."""
    others = {key: value for key, value in inputs.items() if key != "sample"}
    return [((inputs["sample"], torch.full((BATCH,), timestep)), others) for timestep in (10.0, 500.0, 990.0)]


def cast(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) for key, value in inputs.items()}


def isa() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "isa": torch.backends.cpu.get_cpu_capability(),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "vnni": "avx512_vnni" in instruction_sets() or "avx_vnni" in instruction_sets(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def describe(case: Mapping[str, Any]) -> str:
    """What `isa` found, in words."""
    units = f"{case['isa']}{', VNNI' if case['vnni'] else ''}, {'AMX' if case['amx'] else 'no AMX'}"
    return f"{units}; {case['threads']} thread(s); torch {case['torch']}"


def quantize(
    module: torch.nn.Module, inputs: Mapping[str, Tensor], preset: str, dtype: torch.dtype
) -> qdiff_fx.QuantizedUNet:
    """`module` observed on three noise levels; enough for latency, and for ranges of random inputs."""
    config = qdiff_fx.QDiffConfig.preset(
        preset,
        weight_slack=0.0,
        activation_slack=0.0,
        equalize=False,
        weight_observer="minmax",
        activation_observer="minmax",
    )
    prepared = qdiff_fx.prepare(module, config)
    with torch.no_grad():
        for timestep in (10.0, 500.0, 990.0):
            prepared(**inputs, timestep=torch.full((BATCH,), timestep))
    return qdiff_fx.convert(prepared, backend="reference", dtype=dtype, release=True)  # saved, then loaded as each arm


def interleaved(arms: Mapping[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run, arms taking turns, so that a busy moment of the machine hits all of them."""
    times: dict[str, list[float]] = {label: [] for label in arms}
    for turn in range(repeats + 2):
        for label, run in arms.items():
            started = time.perf_counter()
            run()
            if turn >= 2:  # warm caches first
                times[label].append(time.perf_counter() - started)
    return times


def matmul_gops() -> float:
    """What this machine's int8 matmul reaches on 1024 x 1280 x 1280, in 10^9 operations a second."""
    from qdiff_fx.kernels.x86 import linear_call

    rows, size = 1024, 1280
    x = torch.randint(0, 256, (rows, size), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (size, size), dtype=torch.int8)
    call = linear_call(weight, torch.ones(size), None, 1.0, 0, torch.float32)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        call(x)
        times.append(time.perf_counter() - started)
    return 2 * rows * size * size / min(times) / 1e9


def decibels(exact: Tensor, seen: Tensor) -> float:
    error = (exact.double() - seen.double()).pow(2).sum()
    return float(10 * torch.log10(exact.double().pow(2).sum() / error)) if error > 0 else float("inf")


def table(results: Mapping[str, Any]) -> str:
    lines = [
        f"# Latency on CPUs with {' or '.join(sorted({case['isa'] for case in results.values()}))}",
        "",
        "Written by `python benchmarks/latency.py CASE ... --out THIS.json`: one UNet step, arms",
        "interleaved in one process, medians. The arm `w4a8 bf16` has 4-bit weights, 8-bit activations, bf16 carrier;",
        "it runs on the x86 backend under torch.compile, `w4a8 bf16 package` there too, compiled ahead of time,",
        "`w4a8 bf16 openvino` on the openvino backend.",
        "Ours is compiled by `quantized.compile()`, which leaves out guards and stride checks on the model's tensors,",
        "the others by torch.compile(fullgraph=True), which has them: it matters where a step takes milliseconds.",
        "SQNR is against fp32 on one random input without calibration data: it compares arms, not methods.",
    ]
    for name, case in results.items():
        lines += [
            "",
            f"## {name}, batch {case['batch']}",
            "",
            f"{describe(case)}; int8 matmul {case['int8_matmul_gops']:.0f} GOPS in the same run.",
            "",
            "| arm | ms a step | against bf16 compile | against fp32 compile | SQNR, dB |",
            "|---|---|---|---|---|",
        ]
        for label, arm in sorted(case["arms"].items(), key=lambda item: -item[1]["milliseconds"]):
            lines.append(
                f"| {label} | {arm['milliseconds']:.1f} | {arm['speed_over_bf16']:.2f}x | "
                f"{arm['speed_over_fp32']:.2f}x | {arm['sqnr_db']:.1f} |"
            )
        lines += [f"| {label} | {error} | | | |" for label, error in case.get("failed", {}).items()]
        lines += roofline_lines(case) + memory_lines(case)
    return "\n".join(lines) + "\n"


def roofline_lines(case: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {kind} | {gops:.0f} | {gops / case['int8_matmul_gops']:.2f} |"
        for kind, gops in case.get("achieved_gops", {}).items()
    ]
    return ["", "| integer layers | GOPS achieved | share of the int8 matmul |", "|---|---|---|", *rows] if rows else []


def memory_lines(case: Mapping[str, Any]) -> list[str]:
    peak = case.get("peak_bytes", {})
    rows = [
        f"| {name} | {value / 2**20:.0f} | {(value - peak['import']) / 2**20:.0f} |" for name, value in peak.items()
    ]
    header = "| a process that loads and runs one step, not compiled | peak RSS, MiB | above `import` |"
    return ["", header, "|---|---|---|", *rows] if rows else []


if __name__ == "__main__":
    main()
