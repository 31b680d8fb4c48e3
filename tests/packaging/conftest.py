"""The wheel that the packaging tests look into, built once from a copy of the sources."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CACHES = shutil.ignore_patterns("__pycache__", "*.egg-info")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel.

    The copy keeps setuptools' build/ and *.egg-info out of the repository, and keeps whatever an earlier build left
    there out of the wheel. No isolation: the build must work without network.
    """
    source = tmp_path_factory.mktemp("source")
    for name in ("qdiff_fx", "observers", "passes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=CACHES)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = output.glob("*.whl")
    return path
