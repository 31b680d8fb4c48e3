"""`qdiff-fx report`: report.html from the folder of a run."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from qdiff_fx.cli.parser import OneLineParser, verb_parser
from qdiff_fx.errors import InputError
from qdiff_fx.report.html import write_report


def parser() -> OneLineParser:
    """Arguments of this verb."""
    result = verb_parser(
        "report",
        "Write one self-contained report.html into the folder of a demo, quantize or evaluate run.",
        "qdiff-fx report demo",
    )
    result.add_argument("folder", type=Path, metavar="RUN_DIR", help="what --out named")
    return result


def run(arguments: Namespace) -> None:
    """Write the report."""
    if not arguments.folder.is_dir():
        raise InputError(f"{arguments.folder}: no such folder; name what --out of demo, quantize or evaluate was")
    print(write_report(arguments.folder))
