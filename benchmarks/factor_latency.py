"""What channel factors cost at run time: a Stable Diffusion 1.5 step on x86 with and without, in interleaved pairs.

    OMP_NUM_THREADS=1 python benchmarks/factor_latency.py --docs docs

Three arms of the same random weights at W8A8: m = 1; random m where layers share a quantized tensor; random m with a
quantize step for every layer. The ratio of a pair is that of neighbouring runs. Writes results-factor-latency.json and
.md, where other cases and machines are kept.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx

import qdiff_fx
from latency import BATCH, CARRIERS, CASES, describe, give_back_memory, interleaved, isa, with_malloc_settings
from provenance import commit
from qdiff_fx.allocation.channel_factors import input_nodes, readers_of
from qdiff_fx.allocation.factor_search import install_factor
from qdiff_fx.calibration.driver import fit_activations, fit_weights
from qdiff_fx.numerics.affine import QParams
from qdiff_fx.passes.base import PassContext
from qdiff_fx.passes.prepare.own_quantizers import GiveOwnQuantizers
from qdiff_fx.report.tables import markdown_table
from qdiff_fx.safe_io import read_json, write_bytes, write_json

ARMS = {
    "m = 1": "every quantize step has a scalar",
    "random m, shared": "a vector a quantized tensor, shared as the scalar was",
    "random m, shares broken": "a vector and a quantize step of its own for every layer",
}
PLAIN, SHARED, BROKEN = ARMS


def main() -> None:
    with_malloc_settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="sd15-32", choices=list(CASES))
    parser.add_argument("--carrier", default="bf16", choices=list(CARRIERS))
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    arms, kernels, steps = {}, {}, {}
    for arm in ARMS:
        arms[arm], kernels[arm], steps[arm] = build(arguments.case, arm, CARRIERS[arguments.carrier])
    with torch.no_grad():
        times = interleaved(arms, arguments.pairs)
    document = isa() | {
        "case": arguments.case,
        "carrier": arguments.carrier,
        "pairs": arguments.pairs,
        "commit": commit(),
        "arms": {
            arm: {
                "milliseconds": 1e3 * median(times[arm]),
                "quantize_steps": steps[arm],
                "generated_kernels": kernels[arm],
                "ratio": ratio(times[arm], times[PLAIN]),
            }
            for arm in ARMS
        },
    }
    print(table(document))
    kept = arguments.docs / "results-factor-latency.json"
    documents = read_json(kept) if kept.exists() else {}
    documents[f"{arguments.case}, {arguments.carrier} carrier, {describe(document)}"] = document
    write_json(kept, documents)
    write_bytes(arguments.docs / "results-factor-latency.md", page(documents).encode())


def build(case: str, arm: str, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int, int]:
    """(a step, generated kernels, quantize steps) of one arm, compiled; every arm has the same weights."""
    torch.manual_seed(0)
    module, inputs = CASES[case]()
    config = qdiff_fx.QDiffConfig.preset("w8a8", weight_observer="minmax", activation_observer="minmax")
    prepared = qdiff_fx.prepare(module, config)
    timestep = torch.full((len(inputs["sample"]),), 500.0)
    with torch.no_grad():
        prepared(**inputs, timestep=timestep)
    fit_activations(prepared.graph_module)
    fit_weights(prepared.graph_module)
    if arm == BROKEN:
        layers = tuple(user for node in input_nodes(prepared.graph_module) for user in list(node.users)[1:])
        context = PassContext(config=config, signature=prepared.signature)
        GiveOwnQuantizers(layers).run(prepared.graph_module, context)
    if arm != PLAIN:
        give_random_factors(prepared.graph_module)
    prepared.calibrated = True
    steps = sum(1 for _ in input_nodes(prepared.graph_module))
    model = qdiff_fx.convert(prepared, backend="x86", dtype=dtype, release=True).compile()
    del module, prepared
    give_back_memory()
    cast = {name: value.to(dtype) for name, value in inputs.items()}

    def step() -> Tensor:
        result: Tensor = model(**cast, timestep=timestep, return_dict=False)[0]
        return result

    started = time.perf_counter()
    torch._inductor.metrics.reset()
    with torch.no_grad():
        step()
    kernels = torch._inductor.metrics.generated_kernel_count
    print(f"{arm}: {kernels} kernels, compiled in {time.perf_counter() - started:.0f} s", flush=True)
    return step, kernels, steps


def give_random_factors(graph_module: fx.GraphModule) -> int:
    """A log-normal vector of steps for every quantized tensor whose readers can take one; how many got one."""
    generator = torch.Generator().manual_seed(1)
    given = 0
    for node in input_nodes(graph_module):
        quantizer: Any = graph_module.get_submodule(str(node.target))
        readers = readers_of(graph_module, node)
        if not readers:
            continue
        channels = quantizer.statistics.channel_maxima.shape
        factor = torch.exp(0.5 * torch.randn(channels, generator=generator))
        fitted = []
        for reader in readers:
            fitted.append(reader.quantizer.unfitted())
            fitted[-1].channel_factor = factor
            fitted[-1].fit(reader.weight)
        install_factor(quantizer, factor, QParams(quantizer.scale, quantizer.zero_point), readers, fitted)
        given += 1
    return given


def ratio(times: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Median of the pairs' ratios with its 95 % interval from order statistics (binomial, distribution-free)."""
    ratios = sorted(a / b for a, b in zip(times, baseline, strict=True))
    count, rank, tail = len(ratios), 0, 0.5 ** len(ratios)
    while tail <= 0.025 and rank < count // 2:  # P(at most `rank` of the ratios lie under the median)
        rank += 1
        tail += math.comb(count, rank) * 0.5**count
    low = max(0, rank - 1)
    return {"median": median(ratios), "low": ratios[low], "high": ratios[count - 1 - low]}


def page(documents: Mapping[str, dict[str, Any]]) -> str:
    parts = [
        "# What channel factors cost at run time",
        f"Written by `benchmarks/factor_latency.py`: one step at batch {BATCH}, W8A8, backend x86, compiled, the\n"
        "three arms in turns. The ratio is the median of the pairs' ratios with its 95 % interval (order statistics).",
        *(f"## {name}\n\n{table(document)}" for name, document in documents.items()),
    ]
    return "\n\n".join(parts) + "\n"


def table(document: Mapping[str, Any]) -> str:
    header = ("arm", "ms a step", "ratio to m = 1", "95 %", "quantize steps", "generated kernels")
    lines = [
        (
            f"{arm}: {ARMS[arm]}",
            f"{row['milliseconds']:.0f}",
            f"{row['ratio']['median']:.3f}",
            f"{row['ratio']['low']:.3f} to {row['ratio']['high']:.3f}",
            str(row["quantize_steps"]),
            str(row["generated_kernels"]),
        )
        for arm, row in document["arms"].items()
    ]
    facts = f"{document['pairs']} turns, commit `{document.get('commit', 'unknown')}`."
    return "\n\n".join((markdown_table(header, lines, numeric=range(1, len(header))), facts))


if __name__ == "__main__":
    main()
