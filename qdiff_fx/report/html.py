"""One self-contained report.html from a run: no scripts, styles, pictures or fonts from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from qdiff_fx.errors import CheckpointError, InputError
from qdiff_fx.report.benchmark_page import benchmark_page
from qdiff_fx.report.page import Page
from qdiff_fx.report.sections import run_page
from qdiff_fx.safe_io import read_json, write_bytes

RUN_FILES = ("demo.json", "evaluation.json", "calibration.json")
"""What runs leave behind, the richest first."""

REPORT = "report.html"
_RUN_KINDS = ("demo", "evaluate", "quantize")


def write_report(source: Path, out: Path | None = None) -> Path:
    """Render a run to one HTML file; returns its path.

    Args:
      source: the folder of a run, or a JSON file that a run or a benchmark wrote.
      out: None writes report.html into the folder, or beside the JSON file under its name.

    Raises: as `read_page`.
    """
    return write_page(read_page(source), out or report_file(source))


def read_page(source: Path) -> Page:
    """The page of a run's folder, or of a JSON file.

    Raises: InputError if there is no run; CheckpointError if its files are damaged.
    """
    file = source if source.is_file() else run_file(source)
    if file is None:
        raise InputError(f"{source}: none of {', '.join(RUN_FILES)} is in it; run qdiff-fx demo or quantize first")
    return page_of(read_json(file), file)


def write_page(page: Page, target: Path) -> Path:
    """Write `page` as HTML, atomically; returns `target`."""
    write_bytes(target, render(page).encode())
    return target


def report_file(source: Path) -> Path:
    """Where the report of `source` goes unless somebody says otherwise."""
    return source / REPORT if source.is_dir() else source.with_suffix(".html")


def run_file(folder: Path) -> Path | None:
    """The richest document of a run in `folder`; None if there is none."""
    return next((folder / name for name in RUN_FILES if (folder / name).is_file()), None)


def page_of(document: Mapping[str, Any], file: Path) -> Page:
    """The page of a document that stands in `file`, beside its pictures.

    Raises: CheckpointError if the document is not what a run writes; InputError if a picture is missing.
    """
    try:
        if document.get("kind") in _RUN_KINDS:
            return run_page(document, file.parent)
        return benchmark_page(document, file.stem)
    except (InputError, CheckpointError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{file}: is no complete document of a run ({type(error).__name__}: {error}); run it again"
        ) from error


def render(page: Page) -> str:
    """The page as HTML; every text in it is escaped, and only the page's own script may run."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    templates = files("qdiff_fx.report") / "templates"
    texts = {name: (templates / name).read_text(encoding="utf-8") for name in ("report.css", "report.js")}
    template = environment.from_string((templates / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        page=page,
        style=texts["report.css"],
        script=texts["report.js"],
        style_hash=_hash(texts["report.css"]),
        script_hash=_hash(texts["report.js"]),
    )


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
