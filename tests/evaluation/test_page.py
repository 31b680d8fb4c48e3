"""The code of docs/evaluation.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from qdiff_fx.cli.evaluate import parser

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text()


def test_the_page_s_code_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names = {"real_images": torch.rand(40, 1, 28, 28) * 2 - 1, "samples": torch.rand(40, 1, 28, 28) * 2 - 1}
    exec(block, names)
    result = names["result"]
    assert result.extractor == "coarse pixels" and result.reference == "real images"  # type: ignore[attr-defined]
    assert result.frechet > 0  # type: ignore[attr-defined]


def test_every_option_that_the_page_names_exists() -> None:
    named = set(re.findall(r"--[a-z]+", PAGE))
    known = {option for action in parser()._actions for option in action.option_strings}
    assert named <= known
