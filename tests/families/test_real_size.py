"""The public configs at their real size: what the passes find, on the meta device; then the whole chain."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import ControlNetModel

import qdiff_fx
from families import FAST, Family, attentions, fill, run_family, shortcuts
from real_families import CONFIGS, real_call
from subjects import signal_to_noise

pytestmark = pytest.mark.slow


def _expected_shortcuts(widths: tuple[int, ...], layers: int) -> Iterator[tuple[int, int]]:
    """Channels of [h, skip] at every block of the decoder, from the architecture's definition."""
    skips = [widths[0]]
    for level, width in enumerate(widths):
        skips += [width] * layers + [width] * (level < len(widths) - 1)
    hidden = widths[-1]
    for width in reversed(widths):
        for _ in range(layers + 1):
            yield hidden, skips.pop()
            hidden = width


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """benchmarks/families.py, whose name a helper of the tests has too."""
    path = Path(__file__).parents[2] / "benchmarks" / "families.py"
    spec = importlib.util.spec_from_file_location("families_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_found_at_real_size(name: str) -> None:
    kind, config, millions, count = CONFIGS[name]
    with torch.device("meta"):
        unet = kind(**config).eval()
    assert sum(item.numel() for item in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    args, kwargs = real_call(name, unet)
    prepared = qdiff_fx.prepare(unet, FAST, example_inputs=args, example_kwargs=kwargs)
    wanted = tuple(_expected_shortcuts(tuple(unet.config.block_out_channels), unet.config.layers_per_block))
    assert shortcuts(prepared.graph_module) == (() if kind is ControlNetModel else wanted)
    assert attentions(prepared.graph_module) == count
    assert all(item.is_meta for item in prepared.parameters())


@pytest.mark.timeout(1200)
def test_the_cifar_model_goes_through_the_whole_chain(tmp_path: Path) -> None:
    kind, config, _, count = CONFIGS["ddpm-cifar10"]
    run = run_family(Family(build=lambda: kind(**config), shortcuts=(), attentions=count), tmp_path, release=True)
    loaded = qdiff_fx.load(tmp_path, backend="reference")
    args, kwargs = fill(run.calls[0], 420.0, 11)
    with torch.no_grad():
        wanted, seen = run.model(*args, **kwargs).sample, loaded(*args, **kwargs).sample
        assert torch.equal(seen, run.quantized(*args, **kwargs).sample)
    assert signal_to_noise(wanted, seen) > 8
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 0.14 * 4 * 35.7e6


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_chain_at_real_size(name: str, benchmark: ModuleType) -> None:
    """What the table in docs/results-families.md is made by, on smaller samples and fewer of them."""
    side, dtype = benchmark.FAMILIES[name]
    run = benchmark.Run(
        family=name, preset="w8a8", side=min(side, 32 if name == "ddpm-church" else 16), rows=2, dtype=dtype
    )
    record = benchmark.measure(run)
    _, _, millions, count = CONFIGS[name]
    assert record["parameters"] / 1e6 == pytest.approx(millions, abs=0.1)
    assert record["capture_max_error"] == 0
    assert record["found"]["attentions"] == count
    # GiB, from prepare to save, of the resident set: SDXL comes in bfloat16, everything else in float32.
    assert max(record["peak_gib"][stage] for stage in ("prepare", "calibrate", "convert", "save")) < (
        20 if name == "sdxl" else 12
    )
    # A byte a weight, and scales, biases and guarded layers.
    assert record["stored_bytes"] < 1.06 * record["parameters"]
    # 8 bits lose 28 dB and more in the table; two samples of one size leave ranges that others pass.
    assert record["sqnr_db"] > 20
