"""The measurements of `qdiff-fx evaluate`, each as the part of its document that it fills."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qdiff_fx
from qdiff_fx.cli.sources import BUNDLED, Source
from qdiff_fx.errors import InputError
from qdiff_fx.evaluation import (
    FeatureExtractor,
    FeatureStatistics,
    Interval,
    compare_pictures,
    fashion_features,
    from_bytes,
    measure_distribution,
    parts_sqnr,
    sample_in_chunks,
)
from qdiff_fx.evaluation.pictures import PictureMetric
from qdiff_fx.evaluation.study import Measurement, Yardstick
from qdiff_fx.report.tables import decibels, text_table
from qdiff_fx.safe_io import file_digest

SHOWN = 10
"""Lines of a ranking in the printed table; JSON has all."""

_REFERENCE_SEED = 1_000
"""Added to the seed: full-precision samples that others are compared with where there are no real images."""


def yardsticks(source: Source, arguments: Namespace) -> Iterator[Yardstick]:
    """One a seed of the noise."""
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        sampler = source.sampler(
            source.noise(arguments.samples, seed),
            steps=arguments.steps,
            guidance_scale=arguments.guidance,
            keep_steps=True,
        )
        yield Yardstick(source.unet, sampler, num_timesteps=arguments.timesteps, num_calls=arguments.steps)


def pictures(
    made: Sequence[Yardstick], measured: Sequence[Measurement], metrics: Mapping[str, PictureMetric]
) -> dict[str, Any]:
    """Entry "picture_metrics": PSNR, SSIM and `metrics`, one entry a seed."""
    found = [
        compare_pictures(yardstick.reference.images, measurement.images, metrics=metrics)
        for yardstick, measurement in zip(made, measured, strict=True)
    ]
    return {"picture_metrics": [result.to_dict() | {"rows": result.rows()} for result in found]}


def intervals(
    made: Sequence[Yardstick], measured: Sequence[Measurement], compared: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Entry "intervals": every figure's mean over the seeds and 95 % interval, unless one is infinite."""
    figures: dict[str, list[float | None]] = {
        "output SQNR, pooled [dB]": [item.sqnr.pooled_db for item in measured],
        "output SQNR, median over timesteps [dB]": [item.sqnr.median_db for item in measured],
        "end-point PSNR [dB]": [item["psnr_db"] for item in compared],
        "end-point SSIM": [item["ssim"] for item in compared],
    }
    return {"intervals": {name: vars(found) for name, values in figures.items() if (found := _interval(values))}}


def parts(source: Source, quantized: Source, made: Sequence[Yardstick]) -> dict[str, Any]:
    """Entry "parts": SQNR of every layer, attention and block on all held-out calls."""
    reference = qdiff_fx.prepare(source.unet, quantized.unet.qdiff_config)
    calls = [call for yardstick in made for call in yardstick.calls]
    return parts_sqnr(reference, quantized.unet, calls).to_dict()


def ranking(source: Source, quantized: Source, yardstick: Yardstick) -> dict[str, Any]:
    """Entry "sensitivity": what quantizing each part alone costs, fitted and measured on the held-out calls."""
    prepared = qdiff_fx.prepare(source.unet, quantized.unet.qdiff_config)
    report = qdiff_fx.sensitivity(prepared, [(call.args, dict(call.kwargs)) for call in yardstick.calls])
    rows = [
        {"kind": row.kind, "name": row.name, "bits": row.bits, "sqnr_db": row.sqnr_db if row.error > 0 else None}
        for row in report.rows
    ]
    return {"rows": rows, "samples": report.samples, "rank_correlation": report.rank_correlation}


def distribution(source: Source, quantized: Source, arguments: Namespace) -> dict[str, Any]:
    """Entry "distribution": Frechet distance and score of both networks, samples from the same noise, seed by seed."""
    extractor = _extractor(arguments)
    networks = {"full precision": source, "quantized": quantized}
    reference = extractor.reference
    if reference is None:
        seed = arguments.seed + _REFERENCE_SEED
        images = _samples(source, source, arguments, seed)
        reference = FeatureStatistics.of(
            extractor.extract(images), f"samples of the full-precision network, noise seed {seed}"
        )
    document: dict[str, Any] = {}
    for name, network in networks.items():
        found = [
            measure_distribution(_samples(source, network, arguments, seed), extractor, reference)
            for seed in range(arguments.seed, arguments.seed + arguments.seeds)
        ]
        document[name] = {
            "by_seed": [result.to_dict() for result in found],
            "frechet": vars(Interval.over([result.frechet for result in found])),
            "score": None if found[0].score is None else vars(Interval.over([result.score or 0.0 for result in found])),
        }
    return document


def sections(document: Mapping[str, Any]) -> Iterator[str]:
    """Tables for the terminal of what was asked for beyond the yardsticks."""
    many = {name: item for name, item in document["intervals"].items() if item["low"] is not None}
    if many:
        lines = [
            (name, f"{item['mean']:.3f}", f"{item['low']:.3f} to {item['high']:.3f}") for name, item in many.items()
        ]
        seeds = len(next(iter(many.values()))["values"])
        yield text_table((f"over {seeds} seeds", "mean", "95 % interval"), lines, numeric=(1,))
    if "distribution" in document:
        yield _distribution_table(document["distribution"])
    for key, title in (("parts", "output of, all quantized"), ("sensitivity", "quantized alone")):
        if key in document:
            rows = document[key]["parts" if key == "parts" else "rows"]
            yield _ranking_table(title, rows)


def _distribution_table(found: Mapping[str, Any]) -> str:
    first = found["quantized"]["by_seed"][0]
    lines = []
    for name, item in found.items():
        cells = [_cell(item["frechet"])]
        cells.append("–" if item["score"] is None else _cell(item["score"]))
        lines.append((name, *cells))
    head = (
        f"{first['samples']:,} samples a seed; {first['extractor']}; distance from {first['reference']} "
        f"({first['reference_samples']:,} images)"
    )
    return f"{head}\n{text_table(('network', 'Frechet distance', 'score'), lines, numeric=(1, 2))}"


def _ranking_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    worst = sorted(rows, key=lambda row: float("inf") if row["sqnr_db"] is None else row["sqnr_db"])
    lines = [
        (f"{row['kind']} {row['name']}", decibels(row["sqnr_db"]))
        for kind in dict.fromkeys(row["kind"] for row in rows)
        for row in [row for row in worst if row["kind"] == kind][:SHOWN]
    ]
    return text_table((f"{title}, the worst {SHOWN} of each kind", "SQNR [dB]"), lines, numeric=(1,))


def _cell(interval: Mapping[str, Any]) -> str:
    return Interval(**interval).text(3)


def _interval(values: Sequence[float | None]) -> Interval | None:
    finite = [value for value in values if value is not None and value != float("inf")]
    return Interval.over(finite) if len(finite) == len(values) else None


def _extractor(arguments: Namespace) -> FeatureExtractor:
    if arguments.extractor is None:
        if arguments.model not in BUNDLED:
            raise InputError(
                f"--frechet: {arguments.model} is no bundled model, so name --extractor MODULE:NAME, a "
                "FeatureExtractor or a function that gives one (of an Inception network whose weights you have)"
            )
        return fashion_features()
    found = arguments.extractor
    made = found if isinstance(found, FeatureExtractor) else found()
    if not isinstance(made, FeatureExtractor):
        raise InputError(f"--extractor gave a {type(made).__name__}: want a qdiff_fx.evaluation.FeatureExtractor")
    return made


def _samples(source: Source, network: Source, arguments: Namespace, seed: int) -> Tensor:
    """Pictures [--frechet, C, H, W] of `network` in [-1, 1], finished chunks kept under --out."""
    folder = None
    identity = _identity(network)
    if arguments.out is not None:
        folder = Path(arguments.out) / "samples" / f"{identity[:12]}-{seed}"
    unet: Callable[..., Any] = network.unet
    if arguments.compile:
        unet = network.unet.compile() if network.quantized else torch.compile(network.unet)

    def sample(noise: Tensor) -> Tensor:
        sampler = source.sampler(noise, steps=arguments.steps, guidance_scale=arguments.guidance)
        return sampler(unet).images

    images = sample_in_chunks(
        sample,
        source.sample_shape,
        count=arguments.frechet,
        seed=seed,
        folder=folder,
        identity=f"{identity} steps={arguments.steps} guidance={arguments.guidance}",
        description=f"{network.name}, seed {seed}",
    )
    return from_bytes(images)


def _identity(network: Source) -> str:
    """A digest of the network's files."""
    unet = network.folder / "unet" if (network.folder / "unet").is_dir() else network.folder
    digests = [file_digest(path) for path in sorted((*unet.glob("*.safetensors"), *unet.glob("*.json")))]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
