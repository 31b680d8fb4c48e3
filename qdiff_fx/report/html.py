"""One self-contained report.html from a run's folder: no scripts, styles or images from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from qdiff_fx.errors import InputError
from qdiff_fx.report import documents, tables
from qdiff_fx.safe_io import read_json, write_bytes

RUN_FILES = ("demo.json", "evaluation.json", "calibration.json")
"""What runs leave behind, the richest first."""

REPORT = "report.html"
PICTURES = ("samples", "error_growth", "sqnr_by_timestep", "shortcut_ranges", "activation_ranges")
_OPTIONAL = (
    "settings",
    "reference",
    "table",
    "sizes",
    "shortcuts",
    "channels",
    "layers",
    "total_seconds",
    "integer_sqnr_pooled_db",
)


def write_report(folder: Path) -> Path:
    """Render the run in `folder` to report.html in it; returns that path.

    Raises: InputError if the folder holds no run; CheckpointError if its files are damaged.
    """
    source = next((folder / name for name in RUN_FILES if (folder / name).is_file()), None)
    if source is None:
        raise InputError(f"{folder}: none of {', '.join(RUN_FILES)} is in it; run qdiff-fx demo or quantize first")
    html = render(read_json(source), folder)
    write_bytes(folder / REPORT, html.encode())
    return folder / REPORT


def render(run: Mapping[str, Any], folder: Path) -> str:
    """The report of `run`, whose pictures lie in `folder`; sections that the run has no figures for are left out."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        decibels=tables.decibels, percent=tables.percent, file_size=tables.file_size, thousands=lambda n: f"{n:,}"
    )
    templates = files("qdiff_fx.report") / "templates"
    template = environment.from_string((templates / "report.html.jinja").read_text(encoding="utf-8"))
    known = {name: _data_uri(folder / file) for name, file in run.get("pictures", {}).items()}
    return template.render(
        run={**dict.fromkeys(_OPTIONAL), **run},
        cards=documents.cards(run),
        style=(templates / "report.css").read_text(encoding="utf-8"),
        script=(templates / "report.js").read_text(encoding="utf-8"),
        pictures={**dict.fromkeys(PICTURES), **known},
    )


def _data_uri(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: a picture of the run cannot be read ({error.strerror}); run it again") from error
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
