"""Verdicts of the studies' page from the figures, and the counting of bit operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import qdiff_fx
import results
import results_page
from qdiff_fx.allocation.units import total_multiplications
from qdiff_fx.safe_io import write_json
from results_arms import bit_operations

ORIGIN = {"commit": "abc", "seconds": 60.0, "machine": {"processor": "P", "isa": "I", "threads": 1}}


def method(arm: str, seed: int, distance: float) -> dict[str, Any]:
    return ORIGIN | {
        "cell": f"method/{arm}/seed {seed}",
        "arm": arm,
        "seed": seed,
        "steps": 20,
        "extractor": "E",
        "reference": "R",
        "samples": 1000,
        "frechet": {"500": 2 * distance, "1000": distance},
        "score": 3.0,
    }


def page(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    cells = {row["cell"]: row for row in rows}
    results_page.write_page(tmp_path, cells, results.sampling([*cells, "shortcuts"]))
    return (tmp_path / "results-studies.md").read_text()


def test_distances_are_judged_against_full_precision_seed_by_seed(tmp_path: Path) -> None:
    rows = [
        method(arm, seed, distance * (1 + 0.1 * seed))
        for arm, distance in (
            ("full precision", 10.0),
            ("ours W8A8", 10.4),
            ("ours W4A8", 13.0),
            ("linear RTN W4A8", 12.0),
        )
        for seed in (1, 2)
    ]
    text = page(tmp_path, rows)
    assert "- reached: ours W8A8 at most 1.05x of full precision's distance: 1.040 ± 0.000x over 2 seed(s)" in text
    assert "- NOT reached: ours W4A8 at most 1.25x" in text
    assert "The effect does NOT show in the distance: 1.200" in text
    assert "1,000 + 1,000" in text
    assert "Not measured yet: shortcuts." in text


@pytest.mark.parametrize(("last", "verdict"), [(20.0, "the effect shows"), (34.8, "the effect does NOT show")])
def test_whether_a_published_effect_shows_is_computed(tmp_path: Path, last: float, verdict: str) -> None:
    rows = [
        ORIGIN
        | {"cell": f"calibration/{name}/4", "strategy": name, "rows": 40}
        | {"pooled_db": pooled, "median_db": pooled, "endpoint_db": pooled}
        for name, pooled in (("last", last), ("uniform", 35.0))
    ]
    assert verdict in page(tmp_path, rows)


def test_the_split_is_read_from_the_reconstruction_benchmark(tmp_path: Path) -> None:
    def cell(name: str, pooled: float, model: str = "fashion-uncond") -> dict[str, Any]:
        return {"cell": name, "model": model, "pooled_db": pooled, "median_db": pooled, "endpoint_db": pooled}

    other = cell("W4A8/split", 15.0, "fashion-cond")
    cells = [cell("W4A8/RTN MSE", 20.0), cell("W4A8/split", 20.4), other]
    write_json(tmp_path / "results-reconstruction.json", {"cells": cells})
    text = page(tmp_path, [method("full precision", 1, 10.0)])
    assert "| W4A8 | 20.0 -> 20.4 |" in text
    assert "The effect does NOT show: the split gains +0.4 to +0.4 dB" in text


def test_growth_is_drawn_and_judged(tmp_path: Path) -> None:
    rows = [
        ORIGIN
        | {"cell": f"growth/{bits} bits", "bits": bits, "images": 64, "seed": 7}
        | {"errors": [0.01 * (step + 1) / bits for step in range(100)], "mse": [0.1 / bits] * 100}
        for bits in (8, 5, 4)
    ]
    text = page(tmp_path, rows)
    assert "The effect shows: the error grows over the second half, fewer bits end worse." in text
    assert (tmp_path / "images" / results_page.PLOTS["growth"]).stat().st_size > 1000


def test_a_full_run_is_reckoned_from_what_the_cells_cost(tmp_path: Path) -> None:
    row = method("full precision", 1, 10.0) | {"sampling": {"cpu_ms": 9.0, "cpu_seconds": 100.0}, "cpu_seconds": 460.0}
    text = page(tmp_path, [row, method("ours W8A8", 1, 10.0)])
    assert "| full precision | 100,000 | 9.00 | 0.25 |" in text
    assert "| ours W8A8 | 100,000 | (9.00) | 0.25 |" in text
    assert "Sampling 0.50 h; making, compiling and measuring networks 0.10 h in the 1 of 3 cells that say so" in text
    assert "together 0.60 h, 0.30 h on 2 cores" in text


def test_every_cell_has_a_file_of_its_own(tmp_path: Path) -> None:
    names = list(results.cells())
    bench = results.Bench(tmp_path)
    assert len({bench.path(name) for name in names}) == len(names)
    assert sum(name.startswith("method/") for name in names) == 4 * 3 + 7


def test_a_cell_with_fewer_samples_than_asked_for_is_measured_again(tmp_path: Path) -> None:
    asked = []

    def measure(bench: results.Bench) -> dict[str, Any]:
        asked.append(bench.scaled(5000))
        return {"seed": 3}

    for share in (0.1, 0.1, 1.0, 0.1):
        results.Bench(tmp_path, share=share).run("a", measure)
    assert asked == [500, 5000]


def test_bit_operations_are_multiplications_times_both_widths(unconditional: nn.Module) -> None:
    plain = {"weight_slack": 0.0, "activation_slack": 0.0, "equalize": False, "quantize_boundaries": True}
    rule = {"weight_observer": "minmax", "activation_observer": "minmax"}
    prepared = qdiff_fx.prepare(unconditional, qdiff_fx.QDiffConfig.preset("w8a8", **plain, **rule))
    total = total_multiplications(prepared.graph_module)
    assert bit_operations(prepared, full_precision=True) == 32 * 32 * total
    assert bit_operations(prepared) == 8 * 8 * total
