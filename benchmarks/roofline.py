"""What share of this machine's int8 matmul the integer layers of a converted model reach, layer by layer and summed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import prod
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx

import qdiff_fx

KINDS: Mapping[str, str] = {
    f"qdiff.{kernels}_{operator}.default": kind
    for kernels in ("x86", "vnni", "avx2")
    for operator, kind in (("conv2d", "convolutions"), ("linear", "linears"))
}
"""Operators of integer layers, by name: our own are registered only where they run."""


class Stopwatch(fx.Interpreter):
    """Runs a lowered graph call by call and keeps seconds and operations of its integer layers."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.seconds: dict[tuple[str, int], list[float]] = {}
        self.operations: dict[tuple[str, int], float] = {}
        self.place = 0

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.place = 0
        return super().run(*args, **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        kind = KINDS.get(str(target))
        if kind is None:
            return super().call_function(target, args, kwargs)
        started = time.perf_counter()
        result: Tensor = target(*args, **kwargs)
        key = (kind, self.place)
        self.place += 1
        self.seconds.setdefault(key, []).append(time.perf_counter() - started)
        self.operations[key] = 2.0 * result.numel() * _depth(str(target), args)
        return result


def _depth(target: str, args: Any) -> int:
    """Products a result."""
    if target == "qdiff.x86_conv2d.default":
        return prod(args[6][1:])
    if KINDS[target] == "convolutions":
        _, height, width, *_, groups = args[3]
        return int(args[0].shape[1]) // groups * height * width
    return int(args[0].shape[-1])


def achieved_gops(model: qdiff_fx.QuantizedUNet, inputs: Mapping[str, Tensor], repeats: int = 7) -> dict[str, float]:
    """10^9 operations a second of all convolutions and of all linears; medians of `repeats` runs a layer."""
    stopwatch = Stopwatch(model.lowered)
    flat = model.signature.flatten((), dict(inputs))
    with torch.no_grad():
        for _ in range(repeats + 1):
            stopwatch.run(*flat)
    found = {}
    for kind in dict.fromkeys(KINDS.values()):
        keys = [key for key in stopwatch.seconds if key[0] == kind]
        if keys:
            seconds = sum(median(stopwatch.seconds[key][1:]) for key in keys)
            found[kind] = sum(stopwatch.operations[key] for key in keys) / seconds / 1e9
    return found
