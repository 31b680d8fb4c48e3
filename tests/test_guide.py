"""Every block of code in docs/guide runs, on small models in the place of the named ones."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    LDMPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
    VQModel,
)

import qdiff_fx
from adapters import add_ip_adapter
from families import SMALL
from foreign.ddpm_style import DdpmUNet
from pipelines import picture_encoder, stable_diffusion, stable_diffusion_xl, stable_parts
from qdiff_fx.cli import main
from subjects import PLAIN, unconditional_unet

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guide"
PAGES = sorted(path.name for path in GUIDE.glob("*.md") if path.name != "README.md")
FEW = {"num_inference_steps": 2, "num_timesteps": 2, "samples_per_timestep": 4}
SMALLER = {
    r"num_inference_steps=\d+": "num_inference_steps=2",
    r"\(512, 512\)": "(64, 64)",
    r"height=512, width=768": "height=64, width=128",
    r"\.compile\(\)": '.compile(backend="eager")',
    r"range\(0, 1000, 50\)": "range(2)",
}
"""Sizes in seconds instead of hours."""


def _unconditional(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    level = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return unconditional_unet(**level | changes)


def _latent(_: Path) -> LDMPipeline:
    torch.manual_seed(0)
    vqvae = VQModel(block_out_channels=(4,), norm_num_groups=2, latent_channels=3, num_vq_embeddings=16).eval()
    return LDMPipeline(vqvae=vqvae, unet=_unconditional(), scheduler=DDIMScheduler(clip_sample=False))


def _inpaint(folder: Path) -> StableDiffusionInpaintPipeline:
    unet = stable_diffusion(folder / "plain", in_channels=9).unet
    return StableDiffusionInpaintPipeline(unet=unet, **stable_parts(folder / "parts"))


def _controlled(folder: Path) -> StableDiffusionControlNetPipeline:
    unet, controlnet = stable_diffusion(folder / "plain").unet, SMALL["controlnet"].build().eval()
    return StableDiffusionControlNetPipeline(unet=unet, controlnet=controlnet, **stable_parts(folder / "parts"))


STAND_INS: dict[str, Callable[[Path], Any]] = {
    "google/ddpm-cifar10-32": lambda _: DDIMPipeline(unet=_unconditional(), scheduler=DDIMScheduler()),
    "CompVis/ldm-celebahq-256": _latent,
    "openai/diffusers-cd_imagenet64_l2": lambda _: ConsistencyModelPipeline(
        unet=_unconditional(num_class_embeds=1000), scheduler=CMStochasticIterativeScheduler()
    ),
    "you/class-conditional": lambda _: _unconditional(num_class_embeds=10),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
    "stable-diffusion-v1-5/stable-diffusion-inpainting": _inpaint,
    "stabilityai/stable-diffusion-xl-base-1.0": stable_diffusion_xl,
    "you/stable-diffusion-with-controlnet": _controlled,
}
"""What stands for each name on the hub."""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with what the pages take for granted; names give small models, and nothing is searched."""
    parts = iter(range(100))

    def stand_in(original: Any) -> Any:
        def from_pretrained(cls: Any, name: str, **options: Any) -> Any:
            if Path(name).is_dir():
                return original.__func__(cls, name, **options)
            made = STAND_INS[name](tmp_path / f"parts-{next(parts)}")
            if isinstance(made, DiffusionPipeline):
                made.set_progress_bar_config(disable=True)
                made.to(options.get("torch_dtype", torch.float32))
            return made

        return classmethod(from_pretrained)

    preset, collect = qdiff_fx.QDiffConfig.preset, qdiff_fx.CalibrationSet.collect
    quick = {**PLAIN, "weight_observer": "minmax", "activation_observer": "minmax"}
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", stand_in(DiffusionPipeline.from_pretrained))
    monkeypatch.setattr(UNet2DModel, "from_pretrained", stand_in(UNet2DModel.from_pretrained))
    monkeypatch.setattr(StableDiffusionPipeline, "load_ip_adapter", _load_ip_adapter)
    monkeypatch.setattr(qdiff_fx.QDiffConfig, "preset", lambda name, **changes: preset(name, **{**quick, **changes}))
    monkeypatch.setattr(qdiff_fx.CalibrationSet, "collect", lambda pipe, **options: collect(pipe, **options | FEW))
    monkeypatch.setattr("qdiff_fx.stages.quality.GUARD_DB", -1e9)  # random weights
    project: Any = ModuleType("my_project")
    project.MyUNet, project.my_sampler = DdpmUNet, _sample
    monkeypatch.setitem(sys.modules, "my_project", project)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _load_ip_adapter(pipe: Any, _name: str, **_options: Any) -> None:
    add_ip_adapter(pipe.unet)
    pipe.register_modules(**picture_encoder())


def _sample(net: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(4, 3, 8, 8, generator=generator)
    for level in (999.0, 500.0, 0.0):
        sample = sample - 0.1 * net(sample, torch.full((4,), level))
    return sample.detach()


def _python(page: str) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", (GUIDE / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for pattern, smaller in SMALLER.items():
        blocks = [re.sub(pattern, smaller, block) for block in blocks]
    return blocks


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # the one name of all versions
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: str, workplace: Path) -> None:
    namespace: dict[str, Any] = {}
    blocks = _python(page)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    quantized = [item for item in namespace.values() if isinstance(getattr(item, "unet", item), qdiff_fx.QuantizedUNet)]
    assert quantized


@pytest.mark.slow  # the default run has the same commands in test_cli_pipelines.py
@pytest.mark.parametrize("page", [page for page in PAGES if "```sh" in (GUIDE / page).read_text(encoding="utf-8")])
def test_the_commands_of_a_page_run(page: str, workplace: Path) -> None:
    stable_diffusion(workplace / "parts").save_pretrained(workplace / "stable-diffusion-v1-5")
    (workplace / "prompts.txt").write_text("a red boot\na bowl of fruit\n")
    for block in re.findall(r"```sh\n(.*?)```", (GUIDE / page).read_text(encoding="utf-8"), flags=re.DOTALL):
        for command in block.strip().splitlines():
            program, *arguments = shlex.split(re.sub(r"--steps \d+", "--steps 2", command))
            assert program == "qdiff-fx"
            assert main(arguments) == 0
    assert (workplace / "pictures.png").stat().st_size > 0


def test_every_size_that_is_made_smaller_is_on_a_page() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in GUIDE.glob("*.md"))
    assert [pattern for pattern in SMALLER if not re.search(pattern, text)] == []
    assert [name for name in STAND_INS if name not in text] == []


def test_every_page_is_in_the_list_and_every_link_leads_somewhere() -> None:
    index = (GUIDE / "README.md").read_text(encoding="utf-8")
    assert all(f"]({page})" in index for page in PAGES)
    for path in GUIDE.glob("*.md"):
        targets = re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8"))
        assert [target for target in targets if not (GUIDE / target).is_file()] == []
