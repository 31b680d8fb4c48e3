"""What `qdiff-fx demo` leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qdiff_fx.cli import main


@pytest.mark.slow
def test_the_demo_leaves_every_file_it_speaks_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--steps", "4", "--samples", "2", "--calibration-samples", "8", "--calibration-timesteps", "4"]
    assert main(["demo", "--out", str(tmp_path), *sizes]) == 0
    shown = capsys.readouterr().out
    document = json.loads((tmp_path / "demo.json").read_text())
    full = document["sizes"]["fp32"]
    assert document["sizes"]["w4a8"] <= 0.16 * full and document["sizes"]["w8a8"] <= 0.27 * full
    assert {(row["arm"], row["preset"]) for row in document["table"]} == {
        *((arm, preset) for arm in ("rtn", "mse", "mse-split") for preset in ("w8a8", "w4a8", "w4a32")),
        ("ours", "w8a8"),
        ("ours", "w4a8"),
    }
    report = (tmp_path / "report.html").read_text()
    assert all((tmp_path / picture).stat().st_size > 1000 for picture in document["pictures"].values())
    assert report.count("data:image/png;base64,") == len(document["samples"]) == 4
    assert all((tmp_path / sample["file"]).is_file() for sample in document["samples"])
    assert "open " in shown and all(preset.upper() in shown for preset in ("w4a8", "w8a8"))
