"""What README.md shows works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

import qdiff_fx
from qdiff_fx.cli import VERBS
from subjects import unconditional_unet

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

SMALLER = {
    "num_inference_steps=50": "num_inference_steps=4",
    "num_timesteps=20": "num_timesteps=3",
    "samples_per_timestep=64": "samples_per_timestep=8",
    'ReconstructionConfig.preset("fast")': (
        'ReconstructionConfig.preset("fast", weight_iterations=2, activation_iterations=2, batch_size=4)'
    ),
}
"""The example's sizes in seconds instead of minutes; each must still be in it."""


def test_the_python_example_leaves_a_pipeline_that_samples_on_integers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    for written, smaller in SMALLER.items():
        assert written in example
        example = example.replace(written, smaller)
    pipe = DDIMPipeline(unet=unconditional_unet(), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(qdiff_fx.assets, "load_unconditional", lambda: pipe)  # a smaller one
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert isinstance(pipe.unet, qdiff_fx.QuantizedUNet)
    images = pipe(batch_size=2, num_inference_steps=2, output_type="np", generator=torch.Generator()).images
    assert images.shape == (2, 8, 8, 3)


def test_the_example_has_about_ten_lines() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10


def test_every_file_that_it_links_to_is_there() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_every_verb_is_named() -> None:
    assert all(verb in README for verb in VERBS)
