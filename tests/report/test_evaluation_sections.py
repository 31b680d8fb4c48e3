"""What an evaluation measures beyond the yardsticks has its place on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qdiff_fx.report.layer_section import known_layers
from qdiff_fx.report.page import Section
from qdiff_fx.report.sections import run_page
from report_runs import demo_document


def interval(mean: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"values": [mean], "mean": mean, "low": low, "high": high}


def arm(frechet: dict[str, Any], score: dict[str, Any] | None) -> dict[str, Any]:
    told = {"samples": 2000, "extractor": "some classifier", "reference": "images", "reference_samples": 10000}
    return {"by_seed": [told], "frechet": frechet, "score": score}


@pytest.fixture
def sections(tmp_path: Path) -> dict[str, Section]:
    run = demo_document(tmp_path) | {
        "kind": "evaluate",
        "distribution": {
            "full precision": arm(interval(2.0), None),
            "quantized": arm(interval(2.2, 2.0, 2.4), interval(5.0)),
        },
        "intervals": {"end-point PSNR [dB]": interval(30.0, 29.0, 31.0), "end-point SSIM": interval(0.9)},
        "parts": {"parts": [{"kind": "layer", "name": "block1.layer1", "sqnr_db": 33.3}], "rows": 4},
        "sensitivity": {
            "rows": [
                {"kind": "weight", "name": "block1.layer1", "bits": 4, "sqnr_db": 20.0},
                {"kind": "input", "name": "block1.layer1", "bits": 8, "sqnr_db": 20.0},
                {"kind": "block", "name": "1 block", "bits": None, "sqnr_db": None},
            ],
            "samples": 64,
            "rank_correlation": {},
        },
    }
    return {section.id: section for section in run_page(run, tmp_path).sections}


def texts(section: Section) -> list[list[str]]:
    assert section.table is not None
    return [[cell.text for cell in row.cells] for row in section.table.rows]


def test_distances_stand_beside_full_precision_and_name_their_features(sections: dict[str, Section]) -> None:
    assert texts(sections["distribution"]) == [
        ["full precision", "2", "–", "1.000×"],
        ["quantized", "2.2 (2 to 2.4)", "5", "1.100×"],
    ]
    assert "2,000 samples a seed, by the features of some classifier" in sections["distribution"].note


def test_intervals_are_given_where_there_is_more_than_one_seed(sections: dict[str, Section]) -> None:
    assert texts(sections["intervals"]) == [
        ["end-point PSNR [dB]", "30", "29 to 31"],
        ["end-point SSIM", "0.9", "–"],
    ]


def test_measured_sensitivity_takes_the_place_of_the_predicted_one(sections: dict[str, Section]) -> None:
    row = texts(sections["layers"])[1]
    assert row[1] == "block1.layer1" and row[5:7] == ["17.0", "33.3"]  # weight and input add up; its own output
    assert "as measured" in sections["layers"].note and "as measured" in sections["blocks"].note
    assert texts(sections["sensitivity"])[2] == ["block", "1 block", "–", "∞"]
    assert sections["parts"].table is not None and sections["parts"].table.options(0) == ("layer",)


def test_a_run_without_measurements_keeps_its_layers_as_they_are() -> None:
    layers = [{"name": "conv", "error": 0.1}]
    assert known_layers({"layers": layers}) == layers
