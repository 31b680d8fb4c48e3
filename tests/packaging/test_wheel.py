"""A built wheel holds every module and data file, under the names that they are imported by."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLED_AS = {"qdiff_fx": "qdiff_fx", "observers": "qdiff_fx/observers", "passes": "qdiff_fx/passes"}
DATA_SUFFIXES = {".cpp", ".hpp", ".safetensors", ".json", ".html", ".jinja", ".css", ".js", ".typed"}


def _expected(suffixes: set[str]) -> set[str]:
    """Paths inside the wheel of every file below the three roots with one of these suffixes (links not followed)."""
    found = set()
    for root, target in INSTALLED_AS.items():
        for directory, _, names in os.walk(ROOT / root):
            inside = Path(target) / Path(directory).relative_to(ROOT / root)
            found |= {(inside / name).as_posix() for name in names if Path(name).suffix in suffixes}
    return found


def test_the_wheel_holds_every_module_of_the_three_roots_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        modules = {name for name in archive.namelist() if name.endswith(".py")}
    assert modules == _expected({".py"})


def test_the_wheel_holds_all_package_data(wheel: Path) -> None:
    expected = _expected(DATA_SUFFIXES) | {"qdiff_fx/py.typed"}
    with ZipFile(wheel) as archive:
        missing = expected - set(archive.namelist())
    assert not missing


def test_the_wheel_names_the_command_and_the_licence(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        folder = metadata.removesuffix("METADATA")
        assert "qdiff-fx = qdiff_fx.cli:main" in archive.read(folder + "entry_points.txt").decode()
        assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
        assert folder + "licenses/LICENSE" in archive.namelist()


@pytest.fixture(scope="module")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, and nothing else."""
    target = tmp_path_factory.mktemp("installation")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, wheel]
    subprocess.run(command, check=True, capture_output=True)
    return target


def test_an_installed_wheel_serves_observers_and_passes_from_its_own_files(installation: Path, tmp_path: Path) -> None:
    # PYTHONPATH comes before the finder of an editable install, which would serve the repository instead.
    program = (
        "import qdiff_fx, qdiff_fx.observers, qdiff_fx.passes\n"
        "for module in (qdiff_fx, qdiff_fx.observers, qdiff_fx.passes): print(module.__file__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installation)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    names = ("__init__.py", "observers/__init__.py", "passes/__init__.py")
    assert result.stdout.split() == [str(installation / "qdiff_fx" / name) for name in names]
