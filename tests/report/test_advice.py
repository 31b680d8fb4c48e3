"""Warnings of a report name the trouble and the remedy, and stay away where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from qdiff_fx.report.advice import advice

GOOD: dict[str, Any] = {
    "kind": "quantize",
    "quality": {"accepted": True, "pooled_db": 30.0, "median_db": 33.0, "by_timestep": [[0, 30.0], [500, None]]},
    "calibration": {"rows": 200, "timesteps": [0, 500]},
    "layers": [{"name": "conv", "fallback": ""}],
    "backend": "x86",
    "raises": [],
}


def arm(name: str, psnr: float) -> dict[str, Any]:
    figures = {"sqnr_pooled_db": 20.0, "sqnr_median_db": None, "psnr_median_db": psnr, "sqnr_by_timestep": []}
    return {"arm": name, "title": f"the {name}", "preset": "w4a8", **figures}


def test_a_good_run_needs_no_advice() -> None:
    assert advice(GOOD) == ()


@pytest.mark.parametrize(
    ("change", "level", "text", "remedy"),
    [
        ({"quality": {"accepted": False, "pooled_db": 3.04, "median_db": 4.0}}, "warning", "only 3.0 dB", "target"),
        (
            {
                "quality": {"accepted": False, "pooled_db": 3.04, "median_db": 4.0},
                "layers": [
                    {"name": f"n{i}", "fallback": "", "error": error} for i, error in enumerate((1, 3, None, 2))
                ],
            },
            "warning",
            "Quantized alone, n1, n3, n0 cost the most.",
            "target",
        ),
        (
            {"quality": GOOD["quality"] | {"by_timestep": [[0, 7.5], [500, 30.0]]}},
            "warning",
            "1 of 2 timesteps keep less than 10 dB, the worst 7.5 dB at timestep 0",
            "--timesteps",
        ),
        ({"calibration": {"rows": 10, "timesteps": [0, 500]}}, "note", "10 calibration inputs", "--samples 20"),
        ({"backend": "reference"}, "note", "exact and slow", "AVX2"),
        (
            {"layers": [{"name": f"n{i}", "fallback": "no kernel"} for i in range(5)]},
            "note",
            "5 of 5 rows do not run on integers (no kernel): n0, n1, n2 and 2 more.",
            "strict=True",
        ),
        ({"raises": [{"bits": None}, {"bits": 8}]}, "note", "2 quantizers got more", "weight_slack"),
        ({"table": [arm("ours", 30.0), arm("rtn", 31.0)]}, "note", "PSNR 30.0 against 31.0 dB", "end point"),
    ],
)
def test_trouble_is_named_with_its_remedy(change: dict[str, Any], level: str, text: str, remedy: str) -> None:
    (found,) = advice(GOOD | change)
    assert found.level == level
    assert text in found.text
    assert remedy in found.remedy


def test_a_simpler_way_that_is_behind_is_no_news() -> None:
    assert advice(GOOD | {"table": [arm("ours", 31.0), arm("rtn", 30.0)]}) == ()


def test_warnings_come_first() -> None:
    found = advice(GOOD | {"backend": "reference", "quality": {"accepted": False, "pooled_db": 1.0, "median_db": 1.0}})
    assert [item.level for item in found] == ["warning", "note"]
