"""Argument parsing with errors of one line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from qdiff_fx.errors import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line with a pointer to --help, exit status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def verb_parser(verb: str, description: str, example: str) -> OneLineParser:
    """A parser for one verb, with --debug and an example under --help."""
    parser = OneLineParser(
        prog=f"qdiff-fx {verb}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_json_argument(parser: OneLineParser) -> None:
    """--json: one JSON document on stdout instead of text."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text, for machines")


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, want a whole number of 1 or more")
    return int(text)


def output_folder(path: Path) -> Path:
    """`path` as a folder that exists. Raises ConfigError if something else is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be made ({error.strerror}); choose another folder") from error
    return path


def future_folder(path: Path, option: str = "--out") -> Path:
    """`path`, which is a folder or will be one; nothing is made. Raises ConfigError if a file is in the way."""
    blocker = next((item for item in (path, *path.parents) if item.exists()), None)
    if blocker is not None and not blocker.is_dir():
        raise ConfigError(f"{option} {path}: {blocker} is a file; choose another folder")
    return path


def future_file(path: Path, suffix: str, option: str = "--out") -> Path:
    """`path`, which will be a file; nothing is made. Raises ConfigError for another suffix, or a folder there."""
    if path.suffix.lower() != suffix or path.is_dir():
        wanted = path.with_suffix(suffix).name
        raise ConfigError(f"{option} {path}: want the name of a {suffix[1:].upper()} file, such as {wanted}")
    future_folder(path.parent, option)
    return path
