"""Outlier channels planted into the bundled unconditional model without changing its function, and what is left of it.

    python benchmarks/outliers.py --work /tmp/outliers

Writes docs/results-outliers.json and .md. Finished rows are kept in the work folder: a killed run continues.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import qdiff_fx
from qdiff_fx.assets import load_unconditional
from qdiff_fx.errors import QDiffWarning
from qdiff_fx.report.machine import describe_machine
from qdiff_fx.safe_io import read_json, write_bytes, write_json

WIDTH, STREAM = 32, range(2, 8)
"""Streams of so many channels are planted, in these channels: they are closed under the groups of every GroupNorm that
reads them, cats included (groups of 1, 2 and 3 channels)."""

HEAD_CHANNELS = (1, 6)
RATIOS = (10, 100, 1000)
PRESETS = ("w8a8", "w4a8")


@torch.no_grad()
def plant_residual(unet: Any, ratio: float) -> None:
    """Channels of the full-resolution streams `ratio` times larger.

    Every writer is scaled (identity adds carry the factor on), every reader but GroupNorms unscaled.
    """
    _rows(unet.conv_in, STREAM, ratio)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and module.out_channels == WIDTH:
            _rows(module.conv2, STREAM, ratio)
            if module.conv_shortcut is not None:
                _rows(module.conv_shortcut, STREAM, ratio)
        elif isinstance(module, Downsample2D) and module.channels == WIDTH:
            _columns(module.conv, STREAM, 1.0 / ratio)
            _rows(module.conv, STREAM, ratio)
    for block in unet.down_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None and resnet.in_channels == WIDTH:
                _columns(resnet.conv_shortcut, STREAM, 1.0 / ratio)
    deep = unet.mid_block.resnets[-1].out_channels
    for block in unet.up_blocks:
        for resnet in block.resnets:
            offsets = {0: deep, deep: resnet.in_channels - deep}
            planted = [start + channel for start, width in offsets.items() if width == WIDTH for channel in STREAM]
            _columns(resnet.conv_shortcut, planted, 1.0 / ratio)
            deep = resnet.out_channels


@torch.no_grad()
def plant_value(unet: nn.Module, ratio: float) -> None:
    """Rows of v scaled, columns of the output projection unscaled."""
    for module in unet.modules():
        if isinstance(module, Attention):
            _rows(module.to_v, HEAD_CHANNELS, ratio)
            _columns(module.to_out[0], HEAD_CHANNELS, 1.0 / ratio)


@torch.no_grad()
def plant_query(unet: nn.Module, ratio: float) -> None:
    """Rows of q scaled, rows of k unscaled."""
    for module in unet.modules():
        if isinstance(module, Attention):
            _rows(module.to_q, HEAD_CHANNELS, ratio)
            _rows(module.to_k, HEAD_CHANNELS, 1.0 / ratio)


PLANTED: dict[str, Callable[[nn.Module, float], None]] = {
    "residual stream": plant_residual,
    "v": plant_value,
    "q against k": plant_query,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of finished rows")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", QDiffWarning)  # ruined models are the point; their figures are in the table
    pipe = load_unconditional()
    data, held = (_data(pipe, arguments.work / name, seed) for name, seed in (("calibration", 0), ("heldout", 1)))
    runs = [("none", 1, preset, equalize) for preset in PRESETS for equalize in (True, False)]
    runs += [
        (name, ratio, preset, equalize)
        for ratio in sorted(RATIOS, reverse=True)
        for name in PLANTED
        for preset in PRESETS
        for equalize in (True, False)
        if preset == "w8a8" or ratio == max(RATIOS)
    ]
    for run in runs:
        path = arguments.work / f"{'-'.join(str(item) for item in run).replace(' ', '-')}.json"
        if not path.exists():
            write_json(path, _measure(pipe.unet, data, held, *run))
            row = read_json(path)
            print(*run, f"{row['pooled_db']:.1f} {row['median_db']:.1f}", flush=True)
    _write(arguments.work, arguments.docs, len(data), len(held))


def _measure(original: Any, data: Any, held: Any, name: str, ratio: int, preset: str, equalize: bool) -> dict[str, Any]:
    unet = copy.deepcopy(original)
    if name in PLANTED:
        PLANTED[name](unet, float(ratio))
    args, kwargs = held.gather(torch.arange(32))
    with torch.no_grad():
        expected, planted = original(*args, **kwargs).sample, unet(*args, **kwargs).sample
    config = qdiff_fx.QDiffConfig.preset(preset, equalize=equalize)
    if not equalize:
        config = config.replace(weight_slack=0.0, activation_slack=0.0)
    report = qdiff_fx.calibrate(qdiff_fx.prepare(unet, config), data, holdout=held, progress=False)
    return {
        "planted": name,
        "ratio": ratio,
        "preset": preset,
        "equalize": equalize,
        "full_precision_change": float((planted - expected).abs().max() / expected.abs().max()),
        "pooled_db": report.quality["pooled_db"],
        "median_db": report.quality["median_db"],
        "accepted": report.quality["accepted"],
    }


def _data(pipe: Any, path: Path, seed: int) -> Any:
    return qdiff_fx.CalibrationSet.collect(
        pipe,
        num_inference_steps=50,
        num_timesteps=10,
        samples_per_timestep=16,
        seed=seed,
        path=path,
        progress=False,
    )


def _rows(layer: Any, channels: Any, factor: float) -> None:
    layer.weight[list(channels)] *= factor
    if layer.bias is not None:
        layer.bias[list(channels)] *= factor


def _columns(layer: Any, channels: Any, factor: float) -> None:
    layer.weight[:, list(channels)] *= factor


def _write(work: Path, docs: Path, rows: int, held: int) -> None:
    found = [read_json(path) for path in sorted(work.glob("*.json"))]
    write_json(docs / "results-outliers.json", {"machine": describe_machine(), "rows": found})
    by_run = {(row["planted"], row["ratio"], row["preset"], row["equalize"]): row for row in found}
    lines = [
        "# Planted channel outliers on the bundled unconditional model",
        "",
        "Written by `benchmarks/outliers.py`. The planted networks compute the same function in full precision",
        "(change: largest difference over largest output). Equalised: the preset's defaults (channel factors,",
        "attention factors, allocation); plain: without factors and slacks. Rounded to nearest; output SQNR pooled /",
        f"median over timesteps, dB, {rows} calibration rows, {held} held-out rows, one seed.",
        "",
        "| planted | ratio | change | W8A8 equalised | W8A8 plain | W4A8 equalised | W4A8 plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, ratio in dict.fromkeys((row["planted"], row["ratio"]) for row in sorted(found, key=_order)):
        cells = [by_run.get((name, ratio, preset, equalize)) for preset in PRESETS for equalize in (True, False)]
        change = max(row["full_precision_change"] for row in cells if row is not None)
        shown = [f"{row['pooled_db']:.1f} / {row['median_db']:.1f}" if row else "–" for row in cells]
        lines.append(f"| {name} | {ratio} | {change:.0e} | {' | '.join(shown)} |")
    write_bytes(docs / "results-outliers.md", ("\n".join(lines) + "\n").encode())


def _order(row: dict[str, Any]) -> tuple[int, int]:
    return (["none", *PLANTED].index(row["planted"]), row["ratio"])


if __name__ == "__main__":
    main()
