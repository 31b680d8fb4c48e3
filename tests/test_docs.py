"""The site's navigation and its pages agree; `make docs` builds it, with warnings as errors."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import qdiff_fx
from qdiff_fx.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
OBJECTS = [
    (page, name)
    for page in PAGES
    for name in re.findall(r"^::: ([\w.]+)$", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
]


def navigation(entries: Any) -> Iterator[str]:
    for entry in entries:
        for target in entry.values() if isinstance(entry, dict) else (entry,):
            if isinstance(target, str):
                yield target
            else:
                yield from navigation(target)


def test_the_navigation_names_every_page_once_and_no_other() -> None:
    named = sorted(navigation(SITE["nav"]))
    assert named == PAGES, "add the page to `nav` of mkdocs.yml, or take it out there"


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files_of_the_site(page: str) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    inside = [target for target in targets if not re.match(r"[a-z]+:", target)]
    for target in inside:
        file = ((DOCS / page).parent / target).resolve()
        assert file.is_file(), f"{page} links to {target}, which is not there"
        assert file.is_relative_to(DOCS), f"{page} links to {target}, which the site does not contain"


@pytest.mark.parametrize(("page", "name"), OBJECTS)
def test_what_the_reference_shows_exists_and_is_documented(page: str, name: str) -> None:
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
    assert (found.__doc__ or "").strip(), f"{page}: {name} has no docstring"


def test_every_public_name_is_in_the_reference() -> None:
    shown = {name for _, name in OBJECTS}
    for name in qdiff_fx.__all__:
        found = getattr(qdiff_fx, name)
        home = getattr(found, "__module__", found.__name__)
        covered = {home, f"{home}.{name}"} & shown or any(item.startswith(f"{found.__name__}.") for item in shown)
        assert covered, f"{name} is on no page of docs/reference"


def test_every_verb_of_the_command_line_is_in_the_reference() -> None:
    text = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE) == list(VERBS)
