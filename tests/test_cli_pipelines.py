"""The command line on whole pipeline folders: prompts in, a pipeline folder with an integer network out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline
from PIL import Image

import qdiff_fx
from pipelines import stable_diffusion, stable_diffusion_xl
from qdiff_fx.cli import main
from qdiff_fx.report.documents import stored_bytes
from subjects import PLAIN, unconditional_unet

FEW = ["--steps", "3", "--timesteps", "3", "--samples", "4"]
QUANTIZE = ["--preset", "w8a8", "--accept-quality", *FEW]
ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


class _Quick(qdiff_fx.QDiffConfig):
    """No search and no decisions: what is tested here is which files and inputs go where."""

    @classmethod
    def preset(cls, name: str, **changes: Any) -> qdiff_fx.QDiffConfig:
        observers = {"weight_observer": "minmax", "activation_observer": "minmax"}
        return qdiff_fx.QDiffConfig.preset(name, **{**changes, **PLAIN, **observers})


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with patch("qdiff_fx.cli.quantize.QDiffConfig", _Quick):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines as their authors publish them."""
    folder = tmp_path_factory.mktemp("pipelines")
    for name, make in (("sd", stable_diffusion), ("sdxl", stable_diffusion_xl)):
        make(folder / f"{name}-parts").save_pretrained(folder / name)
    torch.manual_seed(0)
    DDIMPipeline(unet=unconditional_unet(**ONE_LEVEL), scheduler=DDIMScheduler()).save_pretrained(folder / "ddim")
    return {name: folder / name for name in ("sd", "sdxl", "ddim")}


@pytest.fixture(scope="module")
def quantized(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion, calibrated on a file of prompts."""
    folder = tmp_path_factory.mktemp("quantized")
    (folder / "prompts.txt").write_text("a red\n\na boot\n")
    out = folder / "sd-w8a8"
    arguments = ["--prompts", str(folder / "prompts.txt"), "--out", str(out), *QUANTIZE]
    assert main(["quantize", str(folders["sd"]), *arguments]) == 0
    return out


def _error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qdiff-fx")]
    assert len(lines) == 1, lines
    return lines[0]


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.float64)


def _run(folder: Path, **options: Any) -> np.ndarray:
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images: np.ndarray = pipe(generator=generator, num_inference_steps=3, output_type="np", **options).images
    return images


def test_the_result_is_a_pipeline_that_diffusers_loads(quantized: Path, folders: dict[str, Path]) -> None:
    wanted, seen = _run(folders["sd"], prompt="a boot"), _run(quantized, prompt="a boot")
    assert type(DiffusionPipeline.from_pretrained(quantized, local_files_only=True).unet) is qdiff_fx.QuantizedUNet
    assert 0 < np.abs(seen - wanted).mean() < 0.02
    document = json.loads((quantized / "calibration.json").read_text())
    assert document["calibration"]["rows"] == 12
    assert document["sizes"]["w8a8"] == stored_bytes(quantized / "unet")


def test_every_other_part_is_copied_as_it_was(quantized: Path, folders: dict[str, Path]) -> None:
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        files = {path.name: path.read_bytes() for path in (folders["sd"] / part).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (quantized / part).iterdir()}
    wanted, seen = (json.loads((folder / "model_index.json").read_text()) for folder in (folders["sd"], quantized))
    assert seen == wanted | {"unet": ["qdiff_fx.model", "QuantizedUNet"]}
    assert not list((quantized / "unet").glob("diffusion_pytorch_model*"))


def test_both_pipelines_sample_from_a_prompt_and_are_quiet_off_a_terminal(
    quantized: Path, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    pictures = []
    for name, folder in (("a.png", folders["sd"]), ("b.png", quantized)):
        prompts = ["--prompt", "a boot", "--prompt", "a red"]
        assert main(["sample", str(folder), "--out", str(tmp_path / name), "--steps", "3", *prompts]) == 0
        pictures.append(_pixels(tmp_path / name))
        assert capsys.readouterr().err == ""
    assert pictures[0].shape[1] > 1.9 * pictures[0].shape[0]  # two pictures beside each other
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 0.02 * 255


def test_an_unconditional_pipeline_needs_no_prompts(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "ddim-w8a8"
    assert main(["quantize", str(folders["ddim"]), "--out", str(out), *QUANTIZE]) == 0
    assert np.abs(_run(out) - _run(folders["ddim"])).mean() < 0.05
    arguments = ["--out", str(tmp_path / "grid.png"), "--samples", "2", "--steps", "3"]
    assert main(["sample", str(out), *arguments]) == 0
    assert (tmp_path / "grid.png").exists()


@pytest.mark.slow
def test_stable_diffusion_xl_with_its_added_conditions(folders: dict[str, Path], tmp_path: Path) -> None:
    data, out = str(tmp_path / "set"), tmp_path / "sdxl-w8a8"
    assert main(["collect", str(folders["sdxl"]), "--prompt", "a boot", "--out", data, *FEW]) == 0
    arguments = ["--calibration", data, "--out", str(out), "--preset", "w8a8", "--dtype", "bf16", "--accept-quality"]
    assert main(["quantize", str(folders["sdxl"]), *arguments]) == 0
    carrier = DiffusionPipeline.from_pretrained(out, local_files_only=True).unet.dtype
    assert carrier == torch.bfloat16
    assert main(["sample", str(out), "--prompt", "a boot", "--out", str(tmp_path / "p.png"), "--steps", "2"]) == 0


def test_a_quantized_pipeline_can_be_inspected_and_is_not_quantized_again(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(quantized), "--json"]) == 0
    assert any(node["dtype"] == "int8" for node in json.loads(capsys.readouterr().out)["nodes"])
    line = _error_line(capsys, "quantize", str(quantized), "--prompt", "a", "--out", str(tmp_path / "x"))
    assert "is quantized already" in line


def test_bad_input_gets_one_line_with_the_remedy(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text(json.dumps({"_class_name": "X", "transformer": ["diffusers", "Y"]}))
    no_vae = tmp_path / "no-vae"
    no_vae.mkdir()
    (no_vae / "model_index.json").write_text((folders["sd"] / "model_index.json").read_text())
    sd, ddim, out = str(folders["sd"]), str(folders["ddim"]), ["--out", str(tmp_path / "out.png")]
    cases = {
        "makes pictures from prompts; pass --prompts FILE": ["quantize", sd],
        "holds no prompt; want one a line": ["quantize", sd, "--prompts", str(tmp_path / "empty.txt")],
        "want UTF-8 text, one prompt a line": ["quantize", sd, "--prompts", str(tmp_path / "latin.txt")],
        "cannot be read": ["collect", sd, "--prompts", str(tmp_path / "none.txt")],
        "--prompt: is empty": ["sample", sd, "--prompt", " "],
        "makes pictures from prompts; pass --prompt TEXT": ["sample", sd],
        "DDIMPipeline takes no prompts; leave them out": ["quantize", ddim, "--prompt", "a"],
        "prompts need the folder of a whole pipeline": ["quantize", "fashion-uncond", "--prompt", "a"],
        "qdiff_fx quantizes UNets, not transformers": ["quantize", str(broken), "--prompt", "a"],
        "diffusers cannot load the pipeline": ["quantize", str(no_vae), "--prompt", "a"],
    }
    for expected, arguments in cases.items():
        assert expected in _error_line(capsys, *arguments, *out)
    assert not (tmp_path / "out.png").exists()


def test_a_pipeline_is_not_written_over_itself(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folders["ddim"] / "model_index.json").read_bytes()
    line = _error_line(capsys, "quantize", str(folders["ddim"]), "--out", str(folders["ddim"]), *QUANTIZE)
    assert "is the pipeline that is quantized; choose another folder" in line
    assert (folders["ddim"] / "model_index.json").read_bytes() == before
