"""What `import qdiff_fx` gives, and what it costs."""

import subprocess
import sys

import pytest

import qdiff_fx


def test_every_public_name_is_there() -> None:
    assert [name for name in qdiff_fx.__all__ if not hasattr(qdiff_fx, name)] == []


def test_subpackages_are_attributes_without_an_import_of_their_own() -> None:
    script = "import qdiff_fx; qdiff_fx.assets.load_unconditional; qdiff_fx.evaluation.endpoint_psnr"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'qdiff_fx' has no attribute 'quantise'"):
        _ = qdiff_fx.quantise  # type: ignore[attr-defined]


def test_the_command_line_lists_its_verbs_without_loading_torch() -> None:
    script = "import sys; from qdiff_fx.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0
