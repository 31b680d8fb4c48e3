"""pyproject.toml's hand-written tables agree with the tree."""

import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _packages(root: str, name: str) -> set[str]:
    """Dotted names of the packages below a root."""
    folders = (path.parent.relative_to(ROOT / root) for path in (ROOT / root).rglob("__init__.py"))
    return {".".join((name, *folder.parts)) for folder in folders}


def test_every_package_is_listed_and_every_listed_package_exists() -> None:
    # Python before 3.13 does not follow links in rglob, later ones only on request: each root is walked by itself.
    found = (
        _packages("qdiff_fx", "qdiff_fx")
        | _packages("observers", "qdiff_fx.observers")
        | _packages("passes", "qdiff_fx.passes")
    )
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_folder_with_modules_is_a_package() -> None:
    for root in ("qdiff_fx", "observers", "passes"):
        for folder, _, names in os.walk(ROOT / root):
            assert "__init__.py" in names or not any(name.endswith(".py") for name in names), folder


def test_the_links_are_relative_so_that_a_clone_elsewhere_works() -> None:
    for name in ("observers", "passes"):
        assert os.readlink(ROOT / "qdiff_fx" / name) == os.path.join("..", name)


def test_constraints_pin_every_direct_dependency() -> None:
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    project = PROJECT["project"]
    requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
    assert {requirement.split(">=")[0].lower() for requirement in requirements} <= pinned
