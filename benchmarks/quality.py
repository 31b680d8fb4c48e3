"""What each step of the method gains on a bundled model, at uniform bits: cell by cell, resumable.

    python benchmarks/quality.py --work /tmp/quality
    python benchmarks/quality.py --work /tmp/quality --model fashion-cond --cells "W4A8/*"

Every finished cell, every reconstructed block and the data are kept in the work folder, so a killed run continues.
Writes docs/results-reconstruction.json and .md, and the plots of the error's growth, from the cells of both models that
are there.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

import qdiff_fx
from cells import gathered, matching
from provenance import origin, slug
from qdiff_fx.calibration.driver import activation_quantizers, weight_quantizers
from qdiff_fx.cli.sources import BUNDLED, Source, open_source
from qdiff_fx.evaluation import Trajectory, endpoint_psnr, output_sqnr, trajectory_error
from qdiff_fx.fake_quantize import QuantizerMode
from qdiff_fx.numerics.affine import QParams
from qdiff_fx.reconstruction import ReconstructionConfig
from qdiff_fx.reconstruction.adaround import learn_rounding
from qdiff_fx.reconstruction.cache import ActivationCache
from qdiff_fx.reconstruction.config import PRESETS
from qdiff_fx.reconstruction.problem import BlockProblem
from qdiff_fx.reconstruction.streams import FULL, QUANTIZED, Streams
from qdiff_fx.reconstruction.subgraph import partition
from qdiff_fx.safe_io import read_json, read_tensors, write_json, write_tensors
from qdiff_fx.stages import correct_biases, layer_input_means, learn_blocks, observe_and_fit
from quality_page import write_page

STEPS, GROWTH_STEPS, IMAGES, MANY_IMAGES, NOISE_SEED = 50, 100, 16, 128, 5
UNIFORM: dict[str, Any] = {"weight_slack": 0.0, "activation_slack": 0.0, "equalize": False, "bias_correction": False}
MINMAX = {"weight_observer": "minmax", "activation_observer": "minmax", "split_shortcuts": False}
NO_STEPS, NO_ROUNDING = {"activation_iterations": 0}, {"weight_iterations": 0}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model to make and to measure.

    Args:
      config: fields of QDiffConfig beyond the width and UNIFORM.
      learn: fields of ReconstructionConfig beyond its preset; None learns nothing.
      preset: of ReconstructionConfig.
      source: the cell whose rounding (and, at the same width, steps) this one begins with.
      seed: of the calibration set, the observers and the learning.
      growth: also follow the error over DDIM-100, for weights alone, activations alone and both.
      images: end points.
    """

    config: dict[str, Any] = field(default_factory=dict)
    learn: dict[str, Any] | None = None
    preset: str = "fast"
    source: str | None = None
    seed: int = 0
    growth: bool = False
    images: int = IMAGES

    @property
    def learning(self) -> ReconstructionConfig | None:
        """All settings of what is learned."""
        if self.learn is None:
            return None
        return ReconstructionConfig.preset(self.preset, seed=self.seed, **self.learn)


def _chain(width: str) -> dict[str, Cell]:
    """The steps of the method at one width; four-bit rounding is learned once, with activations in full precision."""
    learns = width in ("W4A32", "W8A8")
    cells = {
        "RTN min-max": Cell(config=MINMAX),
        "RTN MSE": Cell(config={"split_shortcuts": False}),
        "split": Cell(),
        "bias correction": Cell(config={"bias_correction": True}),
        "SQuant": Cell(learn={"rounding": "squant"} | NO_STEPS),
    }
    for name, granularity in (("layer AdaRound", "layer"), ("block AdaRound", "block")):
        learn = {"granularity": granularity} | NO_STEPS
        cells[name] = Cell(learn=learn) if learns else Cell(source=f"W4A32/{name}")
    if width != "W4A32":
        cells["LSQ"] = Cell(source=f"{width}/block AdaRound", learn=NO_ROUNDING, growth=width == "W4A8")
    return {f"{width}/{name}": cell for name, cell in cells.items()}


CELLS: dict[str, Cell] = {
    **{name: cell for width in ("W4A32", "W4A8", "W8A8", "W4A6", "W4A4") for name, cell in _chain(width).items()},
    **{
        f"seed {seed}/{name}": cell
        for seed in (1, 2)
        for name, cell in {
            "W4A8 block AdaRound": Cell(learn=NO_STEPS, seed=seed),
            "W4A8 LSQ": Cell(source=f"seed {seed}/W4A8 block AdaRound", learn=NO_ROUNDING, seed=seed),
        }.items()
    },
    "preset/W4A32 balanced": Cell(learn=NO_STEPS, preset="balanced"),
    **{
        f"{MANY_IMAGES} images/{width} {name}": replace(
            _chain(width)[f"{width}/{name}"], images=MANY_IMAGES, growth=False
        )
        for width in ("W4A32", "W4A8")
        for name in ("RTN min-max", "RTN MSE", "split")
    },
    f"{MANY_IMAGES} images/W4A32 fast": Cell(source="W4A32/block AdaRound", images=MANY_IMAGES),
    f"{MANY_IMAGES} images/W4A32 balanced": Cell(source="preset/W4A32 balanced", images=MANY_IMAGES),
}

BLOCKS = ("down_blocks.1.downsamplers.0.conv", "mid_block.attentions.0", "down_blocks.2.resnets.0")
"""Their loss is compared over all presets, everything before them rounded to nearest: cells "block/..."."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and finished cells")
    parser.add_argument("--model", choices=list(BUNDLED), default=next(iter(BUNDLED)))
    parser.add_argument("--cells", nargs="*", default=["*"], help="globs over cell names; nothing writes the page only")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    known = [*CELLS, *(f"block/{block}" for block in BLOCKS)]
    bench = Bench(arguments.work / arguments.model, arguments.model)
    for name in matching(known, arguments.cells):
        if not bench.path(name).exists() or bench.stale_presets(name):
            row = bench.run(name) if name in CELLS else bench.run_block(name)
            print({key: row[key] for key in ("cell", "pooled_db", "median_db", "endpoint_db", "presets") if key in row})
    place = {name: index for index, name in enumerate(known)}
    finished = [read_json(path) for path in sorted(arguments.work.glob("*/cells/*.json"))]
    found = gathered(finished, arguments.docs / "results-reconstruction.json", itemgetter("model", "cell"))
    rows = sorted(found.values(), key=lambda row: place.get(row["cell"], len(place)))
    write_page(
        arguments.docs, {model: {row["cell"]: row for row in rows if row["model"] == model} for model in BUNDLED}
    )


class Bench:
    """Data, references and finished cells of one model.

    Args:
      work: the folder of all of them.
      model: a key of BUNDLED; a conditional one is sampled with its guidance.
    """

    def __init__(self, work: Path, model: str) -> None:
        self.work, self.model = work, model

    @cached_property
    def source(self) -> Source:
        """The bundled model with its scheduler."""
        return open_source(self.model)

    def path(self, name: str) -> Path:
        """Of a finished cell."""
        return self.work / "cells" / f"{slug(name)}.json"

    def data(self, name: str, samples: int, seed: int) -> qdiff_fx.CalibrationSet:
        """20 timesteps of DDIM-50 trajectories, `samples` rows at each, of both branches where there is guidance."""
        return self.source.collect(
            guidance_scale=None,
            num_inference_steps=STEPS,
            num_timesteps=20,
            samples_per_timestep=samples,
            seed=seed,
            path=self.work / f"{name}-{seed}",
            progress=False,
        )

    @cached_property
    def heldout(self) -> qdiff_fx.CalibrationSet:
        """Rows of trajectories that nothing was fitted on."""
        return self.data("heldout", 26, 1000)

    @cached_property
    def selection(self) -> qdiff_fx.CalibrationSet:
        """Rows of yet other trajectories, to choose between what was learned and what was not."""
        return self.data("selection", 7, 2000)

    def sample(self, network: Any, *, steps: int = STEPS, images: int = IMAGES) -> Trajectory:
        """From the same noise and for the same prompts, whatever the network."""
        noise = self.source.noise(images, NOISE_SEED)
        return self.source.sampler(noise, steps=steps, guidance_scale=None, keep_steps=True)(network)

    @cache  # noqa: B019 - one bench a process
    def reference(self, images: int) -> torch.Tensor:
        """Samples of the full-precision network."""
        return self.sample(self.source.unet, images=images).images

    def run(self, name: str) -> dict[str, Any]:
        """Make and measure one cell."""
        cell, started = CELLS[name], time.monotonic()
        learning = cell.learning
        prepared, blocks = self._make(name, cell)
        made = time.monotonic()
        sqnr = output_sqnr(self.source.unet, prepared, self.heldout.batches(32))
        psnr = endpoint_psnr(self.reference(cell.images), self.sample(prepared, images=cell.images).images)
        row = origin(cell.seed) | {
            "cell": name,
            "model": self.model,
            "preset": cell.preset if learning is not None else None,
            "learning": learning.to_dict() if learning is not None else None,
            "source": cell.source,
            "calibration_rows": len(self.data("calibration", 52, cell.seed)),
            "heldout_rows": len(self.heldout),
            "pooled_db": sqnr.pooled_db,
            "median_db": sqnr.median_db,
            "endpoint_db": psnr.median_db,
            "endpoint_by_sample": list(psnr.by_sample),
            "by_timestep": [[timestep, value] for timestep, value in sqnr.by_timestep.items()],
            "learning_seconds": sum(block["seconds"] for block in blocks),
            "seconds": made - started,
            "blocks": blocks,
            "growth": self._growth(prepared) if cell.growth else None,
        }
        write_json(self.path(name), row)
        return row

    def stale_presets(self, name: str) -> dict[str, ReconstructionConfig]:
        """Of a cell of one block: presets that it lacks, or has with other settings; {} for other cells."""
        configs = {} if name in CELLS else {preset: ReconstructionConfig.preset(preset) for preset in PRESETS}
        found = read_json(self.path(name)).get("presets", {}) if self.path(name).exists() else {}
        return {
            preset: config
            for preset, config in configs.items()
            if found.get(preset, {}).get("config") != config.to_dict()
        }

    def run_block(self, name: str) -> dict[str, Any]:
        """Learn one block with every stale preset, and keep the losses."""
        stale, made = self.stale_presets(name), origin(0)
        known = read_json(self.path(name))["presets"] if self.path(name).exists() else {}
        data = self.data("calibration", 52, 0)
        prepared = qdiff_fx.prepare(self.source.unet, qdiff_fx.QDiffConfig.preset("w4a32", **UNIFORM))
        observe_and_fit(prepared, data, 32, None, False)
        units = partition(prepared.graph_module)
        with closing(ActivationCache(2**32)) as cache:
            streams = Streams(prepared.graph_module, units, cache, batch_size=32)
            calls = (prepared.signature.flatten(call.args, call.kwargs) for call in data.batches(32))
            streams.load(prepared.signature.names, calls, len(data))
            for unit in units:
                streams.advance(unit, FULL, QuantizerMode.PASS)
                if unit.name == name.partition("/")[2]:
                    break
                streams.advance(unit, QUANTIZED, QuantizerMode.PASS)
                streams.release(unit)
            problem = BlockProblem(unit=unit, streams=streams, mode=QuantizerMode.PASS, exponent=2.0)
            for preset, config in stale.items():
                for item in unit.weights:
                    item.quantizer.round_up = None
                result = learn_rounding(problem, config, 0).to_dict()
                known[preset] = result | {"config": config.to_dict(), "commit": made["commit"]}
        row = made | {"cell": name, "model": self.model, "presets": {preset: known[preset] for preset in PRESETS}}
        write_json(self.path(name), row)
        return row

    def _make(self, name: str, cell: Cell) -> tuple[Any, list[dict[str, Any]]]:
        width = next(part for part in name.replace("/", " ").split() if part[:2] in ("W4", "W8"))
        data = self.data("calibration", 52, cell.seed)
        bits = {"weight_bits": int(width[1]), "activation_bits": int(width[3:])}
        config = qdiff_fx.QDiffConfig(**UNIFORM | bits | {"seed": cell.seed} | cell.config)
        prepared = qdiff_fx.prepare(self.source.unet, config)
        observe_and_fit(prepared, data, 32, None, False)
        if cell.source is not None:
            if not self.path(cell.source).exists():
                self.run(cell.source)
            _take(prepared, read_tensors(self.path(cell.source).with_suffix(".safetensors")))
        blocks: list[dict[str, Any]] = []
        if (learning := cell.learning) is not None:
            folder = self.work / "blocks" / slug(name)
            blocks = [
                item.to_dict() for item in learn_blocks(prepared, data, self.selection, learning, 32, folder, False)
            ]
        if config.bias_correction:
            correct_biases(prepared, layer_input_means(prepared, data, progress=False))
        prepared.set_mode(QuantizerMode.QUANTIZE)
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.path(name).with_suffix(".safetensors"), _learned(prepared))
        return prepared, blocks

    def _growth(self, prepared: Any) -> dict[str, list[float]]:
        """Relative error after each of DDIM-100's steps from the same noise."""
        reference = self.sample(self.source.unet, steps=GROWTH_STEPS)
        curves: dict[str, list[float]] = {}
        for label, weights, activations in (
            ("weights and activations", QuantizerMode.QUANTIZE, QuantizerMode.QUANTIZE),
            ("weights alone", QuantizerMode.QUANTIZE, QuantizerMode.PASS),
            ("activations alone", QuantizerMode.PASS, QuantizerMode.QUANTIZE),
        ):
            prepared.set_mode(activations)
            for quantizer, _ in weight_quantizers(prepared.graph_module):
                quantizer.mode = weights
            curves[label] = trajectory_error(reference.steps, self.sample(prepared, steps=GROWTH_STEPS).steps)
        prepared.set_mode(QuantizerMode.QUANTIZE)
        return curves


def _learned(prepared: Any) -> dict[str, torch.Tensor]:
    """Rounding and steps by the name of their quantizer."""
    tensors: dict[str, torch.Tensor] = {}
    for weight, _ in weight_quantizers(prepared.graph_module):
        if weight.round_up is not None:
            tensors[f"round_up.{weight.name}"] = weight.round_up
    for target, activation in activation_quantizers(prepared.graph_module):
        tensors[f"scale.{activation.spec.bits}.{target}"] = activation.scale
    return tensors


def _take(prepared: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Begin with another cell's rounding, and with its steps where widths agree."""
    for weight, _ in weight_quantizers(prepared.graph_module):
        if (rounding := tensors.get(f"round_up.{weight.name}")) is not None:
            weight.round_up = rounding.to(torch.bool)
    for target, activation in activation_quantizers(prepared.graph_module):
        if (scale := tensors.get(f"scale.{activation.spec.bits}.{target}")) is not None:
            activation.set_qparams(QParams(scale, activation.zero_point))


if __name__ == "__main__":
    main()
