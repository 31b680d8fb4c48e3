"""`qdiff-fx report`: report.html from any run."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import qdiff_fx
from qdiff_fx.cli.parser import OneLineParser, add_json_argument, future_folder, verb_parser
from qdiff_fx.errors import ConfigError, InputError
from qdiff_fx.report.documents import stored_bytes, stored_document
from qdiff_fx.report.html import page_of, read_page, report_file, run_file, write_page
from qdiff_fx.report.page import Page

_PLAN = "plan.json"


def parser() -> OneLineParser:
    """Arguments of this verb."""
    result = verb_parser(
        "report",
        "Write one self-contained HTML file: of the folder of a demo, quantize or evaluate run, of any quantized\n"
        "folder, or of the JSON file of a run or a benchmark. It needs no network.",
        "qdiff-fx report demo",
    )
    result.add_argument("run", type=Path, metavar="RUN", help="what --out named, or a JSON file")
    result.add_argument("--out", type=Path, metavar="HTML", help="the file (report.html in the folder of the run)")
    add_json_argument(result)
    return result


def run(arguments: Namespace) -> None:
    """Write the report."""
    source, out = arguments.run, arguments.out
    if not source.exists():
        raise InputError(f"{source}: no such folder; name what --out of demo, quantize or evaluate was, or a JSON file")
    if out is not None:
        if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
            raise ConfigError(f"--out {out}: want the name of an HTML file, such as {out.with_suffix('.html').name}")
        future_folder(out.parent)
    page = _stored_page(source) if _is_stored_alone(source) else read_page(source)
    written = write_page(page, out or report_file(source))
    if arguments.json:
        print(json.dumps({"report": str(written), "advice": [asdict(item) for item in page.advice]}, indent=1))
    else:
        print(written)


def _is_stored_alone(source: Path) -> bool:
    """Whether `source` is a saved network without the run that made it."""
    return source.is_dir() and run_file(source) is None and (source / _PLAN).is_file()


def _stored_page(folder: Path) -> Page:
    document = stored_document(folder.name, qdiff_fx.load(folder), stored_bytes(folder))
    return page_of(document, folder / _PLAN)
