"""Latency, memory and roofline of one UNet step on an NVIDIA GPU: compiled fp16, torchao, and the cuda backend.

    python benchmarks/latency_cuda.py sd15 sdxl --out docs/results-cuda.json

It needs torch, triton, torchao and diffusers, no network and no weights: they are random, so quality means nothing and
the SQNR against fp16 only shows that an arm computes the same network. All arms of an architecture run in one process,
interleaved, batch 2; medians, and medians of the ratios of neighbouring runs. The page is written beside the JSON
as .md. An arm that fails stands there with its error, the others go on, and the command fails. `--rehearse` runs all of
it on the CPU, kernels in Triton's interpreter, on a network that it can take.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

import qdiff_fx
from architectures import ARCHITECTURES, BATCH
from latency_cuda_page import BASELINE, page
from qdiff_fx.autotune.cuda import device_clock
from qdiff_fx.autotune.timer import gpu_seconds, processor_seconds
from qdiff_fx.kernels.cuda_gpu import GPUS, Gpu, gpu_for
from qdiff_fx.kernels.cuda_model import LayerWork, integer_layer
from qdiff_fx.kernels.cuda_tiles import Product
from qdiff_fx.kernels.triton_kernels.launch import SMALLEST_INT_MM
from qdiff_fx.safe_io import write_bytes, write_json

CARRIER = torch.float16
TORCHAO = "torchao int8 dynamic"
PRESETS = ("w8a8", "w4a8")
AUTOTUNED = ", autotuned"
"""Behind the preset: kernels by timings instead of the performance model."""
ARMS = (BASELINE, TORCHAO, *(preset + tuned for preset in PRESETS for tuned in ("", AUTOTUNED)))

MODES = ("max-autotune", "reduce-overhead")
"""Of torch.compile; both replay CUDA graphs, the first searches kernels for every matmul and convolution: minutes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", choices=[*ARCHITECTURES, []], help="none: only write the page anew")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help=f"{BASELINE!r} always runs")
    parser.add_argument("--mode", choices=MODES, default=MODES[0], help="of torch.compile, for every arm")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in Triton's interpreter")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    if not options.architectures:
        if not results:
            parser.error(f"{options.out} holds nothing yet: name an architecture")
        write_bytes(options.out.with_suffix(".md"), page(results).encode())
        return
    wanted = "1" if options.rehearse else "0"
    if os.environ.get("TRITON_INTERPRET", "0") != wanted:  # read when the kernels are decorated
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": wanted})
    machine = Machine(rehearsal=options.rehearse, mode=options.mode)
    failed = False
    for name in options.architectures:
        torch.manual_seed(0)
        case = name if tuple(options.arms) == ARMS else f"{name}: {', '.join(options.arms)}"
        results[case] = measure(name, machine, options.repeats, options.arms)
        failed = failed or bool(results[case]["errors"])
        write_json(options.out, results)
        write_bytes(options.out.with_suffix(".md"), page(results).encode())
    sys.exit(failed)


class Machine:
    """The GPU, or the CPU in a rehearsal: where tensors go, how code is compiled, timed and weighed."""

    def __init__(self, *, rehearsal: bool, mode: str = MODES[0]) -> None:
        reason = qdiff_fx.kernels.BACKENDS["cuda"].unavailable("cpu" if rehearsal else "cuda")
        if reason is not None:
            sys.exit(f"latency_cuda.py: {reason}")
        self.device = torch.device("cpu" if rehearsal else "cuda")
        self.on_gpu = not rehearsal
        self.mode = mode
        self.compile_options: dict[str, Any] = {"mode": mode} if self.on_gpu else {"backend": "aot_eager"}

    @property
    def gpu(self) -> Gpu:
        """Its peaks; an H100's in a rehearsal."""
        return gpu_for(torch.cuda.get_device_capability()) if self.on_gpu else GPUS[(9, 0)]

    @property
    def name(self) -> str:
        """For the page."""
        return torch.cuda.get_device_name() if self.on_gpu else "a CPU (rehearsal: times mean nothing)"

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one run, on the device's own clock."""
        return gpu_seconds(run) if self.on_gpu else processor_seconds(run)

    def kernels(self, run: Callable[[], Any]) -> dict[str, list[float]]:
        """Kernels of a run by name: how many, and their seconds together; {} in a rehearsal."""
        if not self.on_gpu:
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                entry = found.setdefault(event.name, [0, 0.0])
                entry[0] += 1
                entry[1] += 1e-6 * event.device_time
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def allocated(self) -> int:
        """Bytes that tensors hold on the GPU; 0 in a rehearsal."""
        gc.collect()
        return torch.cuda.memory_allocated() if self.on_gpu else 0

    def peak(self, run: Callable[[], Any]) -> int:
        """Most bytes that tensors held during a run; 0 in a rehearsal."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() if self.on_gpu else 0


def measure(name: str, machine: Machine, repeats: int, wanted: Sequence[str] = ARMS) -> dict[str, Any]:
    unet, examples = ARCHITECTURES[name]()
    folders = {
        preset: stored(unet, examples, preset)
        for preset in PRESETS
        if any(label.startswith(preset) for label in wanted)
    }
    inputs = moved(examples, machine.device)
    unet = unet.to(CARRIER)
    makers: dict[str, Callable[[], Any]] = {
        BASELINE: lambda: unet.to(machine.device, memory_format=torch.channels_last),
        TORCHAO: lambda: torchao_linears(unet, inputs, machine),
    }
    for preset, folder in folders.items():
        for autotune in (False, True):
            makers[preset + AUTOTUNED * autotune] = partial(load, folder.name, machine, autotune=autotune)
    makers = {label: make for label, make in makers.items() if label in (BASELINE, *wanted)}
    arms: dict[str, Arm] = {}
    errors: dict[str, str] = {}
    with torch.no_grad():
        for label, make in makers.items():
            try:
                arms[label] = made_arm(make, inputs, machine)
                print(f"{name}: {label} compiled in {arms[label].compile_seconds:.0f} s", flush=True)
            except Exception as error:  # whatever it is, the other arms' minutes are not lost
                if label == BASELINE:
                    raise
                errors[label] = f"{type(error).__name__}: {error}"
                print(f"{name}: {label} failed", file=sys.stderr)
                traceback.print_exc()
        times = interleaved({label: arm.run for label, arm in arms.items()}, machine, repeats)
        kernels = {label: machine.kernels(arm.run) for label, arm in arms.items()}
    for folder in folders.values():
        folder.cleanup()
    return {
        "device": machine.name,
        "torch": torch.__version__,
        "mode": machine.mode,
        "rehearsal": not machine.on_gpu,
        "batch": BATCH,
        "arms": {
            label: {
                "milliseconds": 1e3 * median(times[label]),
                "speed": median(b / a for a, b in zip(times[label], times[BASELINE], strict=True)),
                "sqnr_db": decibels(arms[BASELINE].result, arm.result),
                "weights": arm.weights,
                "peak": arm.peak,
                "make_seconds": arm.make_seconds,
                "compile_seconds": arm.compile_seconds,
            }
            for label, arm in arms.items()
        },
        "errors": errors,
        "kernels": kernels,
        "layers": {label: arm.layers for label, arm in arms.items() if arm.layers},
        "reports": {label: arm.report for label, arm in arms.items() if arm.report},
    }


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A compiled model: one step of it, what the step gave, and what was measured while it was made."""

    run: Callable[[], Tensor]
    result: Tensor
    weights: int
    peak: int
    make_seconds: float
    compile_seconds: float
    layers: list[dict[str, Any]]
    report: str


def made_arm(make: Callable[[], Any], inputs: Mapping[str, Any], machine: Machine) -> Arm:
    timestep = torch.full((BATCH,), 500.0, device=machine.device)
    before = machine.allocated()
    started = time.perf_counter()
    model = make()
    make_seconds = time.perf_counter() - started
    weights = machine.allocated() - before
    ours = isinstance(model, qdiff_fx.QuantizedUNet)
    layers = roofline(model, inputs, timestep, machine) if ours else []
    compiled = torch.compile(model, fullgraph=True, **machine.compile_options)

    def run() -> Tensor:
        result: Tensor = compiled(**inputs, timestep=timestep, return_dict=False)[0]
        return result

    started = time.perf_counter()
    run()
    compile_seconds = time.perf_counter() - started
    # The second run records a CUDA graph and allocates what a step needs; the third replays it.
    peak = machine.peak(lambda: [run() for _ in range(2)]) - before
    return Arm(
        run=run,
        result=run().float().cpu(),
        weights=weights,
        peak=peak,
        make_seconds=make_seconds,
        compile_seconds=compile_seconds,
        layers=layers,
        report=str(model.lowering_report()) if ours else "",
    )


def stored(unet: torch.nn.Module, inputs: Mapping[str, Any], preset: str) -> tempfile.TemporaryDirectory[str]:
    """`unet` converted on the CPU and saved: calibrate anywhere, load on the GPU."""
    config = qdiff_fx.QDiffConfig.preset(
        preset,
        weight_slack=0.0,
        activation_slack=0.0,
        equalize=False,
        weight_observer="minmax",
        activation_observer="minmax",
    )
    with torch.no_grad():
        prepared = qdiff_fx.prepare(unet, config, example_kwargs={**inputs, "timestep": torch.full((BATCH,), 500.0)})
        for level in (10.0, 500.0, 990.0):
            prepared(**inputs, timestep=torch.full((BATCH,), level))
    quantized = qdiff_fx.convert(prepared, backend="reference", dtype=CARRIER)
    folder = tempfile.TemporaryDirectory()
    qdiff_fx.save(quantized, folder.name)
    return folder


def load(folder: str, machine: Machine, *, autotune: bool) -> Any:
    return qdiff_fx.load(folder, backend="cuda", device=machine.device, autotune=autotune)


def torchao_linears(unet: torch.nn.Module, inputs: Mapping[str, Any], machine: Machine) -> torch.nn.Module:
    """A copy of `unet` with torchao's dynamic int8 on its linears, but for those of too few rows for torch._int_mm."""
    model = copy.deepcopy(unet).to(machine.device)
    rows = linear_rows(model, inputs, machine)
    quantize_(
        model,
        Int8DynamicActivationInt8WeightConfig(),
        filter_fn=lambda module, name: rows.get(name, 0) >= SMALLEST_INT_MM,
    )
    return model


def linear_rows(model: torch.nn.Module, inputs: Mapping[str, Any], machine: Machine) -> dict[str, int]:
    """Rows that each linear multiplies in one step, by its name."""
    rows: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Linear, _: Any, output: Tensor) -> None:
            rows[name] = output.numel() // module.out_features

        return hook

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    handles = [module.register_forward_hook(note(name)) for name, module in linears]
    model(**inputs, timestep=torch.full((BATCH,), 500.0, device=machine.device), return_dict=False)
    for handle in handles:
        handle.remove()
    return rows


class Timer(fx.Interpreter):
    """Runs a lowered graph and times each kernel of ours, one of every kind, on the operands that it has there."""

    def __init__(self, graph_module: fx.GraphModule, machine: Machine) -> None:
        super().__init__(graph_module)
        self.machine = machine
        self.rows: dict[str, dict[str, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        target: Any = n.target
        if str(target) not in ("qdiff.cuda_conv2d.default", "qdiff.cuda_linear.default"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        names = [item.name for item in target._schema.arguments]
        call = dict(zip(names, args, strict=True))
        result = target(*args, **kwargs)  # the first call compiles
        work = _work(call, result)
        product = work.product
        kind = "linear" if "kernel" in call else "conv {}x{}".format(*call["weight_shape"][2:])
        steps = [step for step in ("embedding", "residual", "inv_scale") if call[step] is not None]
        kernel = "int_mm" if call.get("kernel") == "int_mm" else _tile_name(call["tile"])
        shape = f"{product.rows} x {product.outputs * product.groups} x {product.depth * product.taps}"
        key = " ".join((kind, shape, str(call.get("stride", "")), *steps, kernel))
        if key not in self.rows:
            (seconds,) = device_clock(self.machine.device)([lambda: target(*args, **kwargs)])
            estimate = integer_layer(work, self.machine.gpu)
            self.rows[key] = {
                "kind": " ".join((kind, *(f"+ {step}" for step in steps))),
                "shape": shape,
                "kernel": kernel,
                "count": 0,
                "seconds": seconds,
                "floor": estimate.floor,
                "operations": estimate.operations,
                "bytes": estimate.bytes,
            }
        self.rows[key]["count"] += 1
        return result


def roofline(model: Any, inputs: Mapping[str, Any], timestep: Tensor, machine: Machine) -> list[dict[str, Any]]:
    timer = Timer(model.lowered, machine)
    timer.run(*model.signature.flatten((), {**inputs, "timestep": timestep}))
    return list(timer.rows.values())


def _tile_name(tile: Sequence[int]) -> str:
    *shape, _, _, descriptors, split = tile
    name = "x".join(str(item) for item in shape) + " by descriptors" * descriptors
    return f"{name}, split {split}" if split > 1 else name


def _work(call: Mapping[str, Any], result: Tensor) -> LayerWork:
    outputs, depth, *kernel = call["weight_shape"]
    groups = call.get("groups", 1)
    product = Product(
        rows=result.numel() // outputs,
        outputs=outputs // groups,
        depth=depth,
        taps=kernel[0] * kernel[1] if kernel else 1,
        groups=groups,
        packed=call["weight_zero_point"] is not None,
        stride_one=set(call.get("stride", [1])) == {1},
    )
    return LayerWork(product=product, input_elements=call["x"].numel())


def interleaved(arms: Mapping[str, Callable[[], Tensor]], machine: Machine, repeats: int) -> dict[str, list[float]]:
    """Seconds of every run, arms taking turns, so that clocks and temperatures are those of all."""
    times: dict[str, list[float]] = {label: [] for label in arms}
    for turn in range(repeats + 2):
        for label, run in arms.items():
            seconds = machine.seconds(run)
            if turn >= 2:
                times[label].append(seconds)
    return times


def moved(value: Any, device: torch.device) -> Any:
    """Inputs in the carrier type, on the device."""
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    return value.to(device, CARRIER)


def decibels(exact: Tensor, seen: Tensor) -> float | None:
    """SQNR; None where the result is not finite or the same."""
    error = (exact.double() - seen.double()).pow(2).sum()
    ratio = float(exact.double().pow(2).sum() / error) if error > 0 else 0.0
    return float(10 * torch.log10(torch.tensor(ratio))) if 0 < ratio < float("inf") else None


if __name__ == "__main__":
    main()
