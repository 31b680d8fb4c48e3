"""report.html stands alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qdiff_fx.errors import InputError
from qdiff_fx.report import plots
from qdiff_fx.report.documents import most_varying
from qdiff_fx.report.html import write_report
from qdiff_fx.report.pictures import LabelledRow, image_strip, save_comparison
from qdiff_fx.report.tables import markdown_table, results_markdown, text_table
from qdiff_fx.safe_io import write_json


def row(arm: str, preset: str) -> dict[str, Any]:
    return {
        "arm": arm,
        "title": f"<{arm}>",
        "preset": preset,
        "sqnr_pooled_db": 20.0,
        "sqnr_median_db": None,
        "sqnr_by_timestep": [[0, 10.0], [500, 20.0]],
        "psnr_median_db": 30.0,
        "error_by_step": [0.1, 0.2],
        "confident_share": 0.5,
    }


@pytest.fixture
def run() -> dict[str, Any]:
    return {
        "kind": "demo",
        "model": {"name": "<model>", "parameters": 1000, "layers": 2},
        "machine": {"processor": "some CPU", "isa": "avx2", "threads": 2, "torch": "2.13"},
        "settings": {
            "steps": 2,
            "samples": 3,
            "heldout_rows": 6,
            "heldout_timesteps": 2,
            "calibration_rows": 8,
            "calibration_timesteps": 2,
            "calibration_seed": 0,
            "evaluation_seed": 1,
            "backend": "reference",
        },
        "reference": {"confident_share": 0.6},
        "table": [row("rtn", "w4a8"), row("ours", "w4a8")],
        "sizes": {"fp32": 4000, "fp16": 2000, "w4a8": 600},
        "integer_sqnr_pooled_db": 19.9,
        "layers": [
            {
                "name": "conv",
                "weight_bits": 4,
                "activation_bits": 8,
                "bytes": 10,
                "bytes_before": 80,
                "kernel": "qdiff.conv2d",
                "reason": "",
            }
        ],
        "pictures": {"samples": "samples.png", "error_growth": "error.png"},
        "total_seconds": 12.0,
    }


def write_pictures(folder: Path) -> None:
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    save_comparison(folder / "samples.png", [LabelledRow(title="FP32", detail="x", images=images)])
    plots.plot_error_growth(folder / "error.png", [{"label": "ours", "colour": "ours", "errors": [0.1, 0.2]}])


def test_the_report_needs_nothing_from_elsewhere(run: dict[str, Any], tmp_path: Path) -> None:
    write_pictures(tmp_path)
    write_json(tmp_path / "demo.json", run)
    html = write_report(tmp_path).read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert len(sources) == 3
    assert all(source.startswith("data:") for source in sources)
    assert "http:" not in html
    assert "https:" not in html


def test_names_are_escaped(run: dict[str, Any], tmp_path: Path) -> None:
    write_pictures(tmp_path)
    write_json(tmp_path / "demo.json", run)
    html = write_report(tmp_path).read_text()
    assert "<model>" not in html
    assert "&lt;model&gt;" in html


def test_a_missing_picture_is_named(run: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "demo.json", run)
    with pytest.raises(InputError, match=r"error\.png: a picture of the run cannot be read"):
        write_report(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of demo\.json"):
        write_report(tmp_path)


def test_results_in_markdown_hold_every_arm_and_size(run: dict[str, Any]) -> None:
    text = results_markdown(run)
    assert "| <ours> | W4A8 | 20.0 | ∞ | 30.0 | 50 % |" in text
    assert "| W4A8 | 600 | 0.150 |" in text


def test_tables_are_aligned() -> None:
    rows = [("long name", "1"), ("x", "100")]
    assert text_table(("a", "b"), rows, numeric=(1,)).splitlines()[2:] == ["long name    1", "x          100"]
    assert markdown_table(("a", "b"), rows, numeric=(1,)).splitlines()[1] == "| --- | ---: |"


def test_a_strip_puts_images_side_by_side_on_white() -> None:
    strip = image_strip(torch.zeros(3, 1, 4, 5), columns=2)
    assert strip.shape == (4 + 2 + 4, 5 + 2 + 5, 3)
    assert (strip[:4, 5:7] == 255).all()
    assert (strip[:4, :5] == 0).all()


def test_latents_are_no_pictures() -> None:
    with pytest.raises(InputError, match="latents are no pictures"):
        image_strip(torch.zeros(1, 4, 8, 8), columns=1)


def test_an_activation_that_many_layers_read_counts_once() -> None:
    rows = [
        {"name": name, "channel_maxima": [1.0], "by_timestep": [[0, -low, 1.0], [9, -1.0, 1.0]]}
        for name, low in (("a", 3.0), ("b", 3.0), ("c", 2.0), ("d", 1.0))
    ]
    assert [item["name"] for item in most_varying(rows, 2)] == ["a", "c"]
