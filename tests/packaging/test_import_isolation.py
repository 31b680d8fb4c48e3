"""Under pytest the two top-level folders can be reached by their installed names only."""

from importlib.util import find_spec


def test_observers_and_passes_are_no_top_level_modules() -> None:
    assert find_spec("observers") is None
    assert find_spec("passes") is None
    assert find_spec("qdiff_fx.observers") is not None
    assert find_spec("qdiff_fx.passes") is not None
