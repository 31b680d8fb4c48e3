"""Picture by picture against full precision from the same noise: PSNR, SSIM, and metrics whose weights a user has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qdiff_fx.errors import InputError
from qdiff_fx.evaluation.quality import IMAGE_RANGE, endpoint_psnr

PictureMetric = Callable[[Tensor, Tensor], Tensor]
"""One figure a picture, [B], from (reference, picture), both [B, C, H, W] in [-1, 1]: LPIPS and the like."""

PromptMetric = Callable[[Tensor, list[str]], Tensor]
"""One figure a picture, [B], from pictures [B, C, H, W] in [-1, 1] and their prompts: CLIP score and the like."""

_SIGMA, _REACH = 1.5, 5
"""Of SSIM's Gaussian window, 11x11 pixels (Wang et al., 2004); on smaller pictures it is the largest one that fits."""


@dataclass(frozen=True, kw_only=True)
class PictureResult:
    """Medians over pictures, and every picture's figure.

    Args:
      psnr_db: None where the pictures are equal.
      ssim: structural similarity, 1 for equal pictures.
      others: median of each metric that was passed in, by its name.
      by_picture: figures by name ("psnr_db", "ssim", and the others'), in the order of the pictures.
    """

    psnr_db: float | None
    ssim: float
    others: Mapping[str, float] = field(default_factory=dict)
    by_picture: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Lines of a table: what, and the figure."""
        lines = [
            ("end-point PSNR, median over samples", "∞ dB" if self.psnr_db is None else f"{self.psnr_db:.1f} dB"),
            ("end-point SSIM, median over samples", f"{self.ssim:.4f}"),
        ]
        return lines + [(f"{name}, median over samples", f"{value:.4f}") for name, value in self.others.items()]


def compare_pictures(
    reference: Tensor, images: Tensor, *, metrics: Mapping[str, PictureMetric] | None = None
) -> PictureResult:
    """PSNR, SSIM (torchmetrics', extra [eval]) and `metrics` of pictures from the same noise, clamped to [-1, 1].

    Args:
      reference, images: [B, C, H, W].
      metrics: by name, e.g. {"LPIPS": my_lpips}; no weights of such networks travel with the package.

    Raises: InputError if shapes differ, or a metric does not give one finite figure a picture; NonFiniteError.
    """
    psnr = endpoint_psnr(reference, images)
    exact, seen = reference.float().clamp(-1, 1), images.float().clamp(-1, 1)
    by_picture: dict[str, tuple[float | None, ...]] = {
        "psnr_db": tuple(None if value == float("inf") else value for value in psnr.by_sample),
        "ssim": _ssim(exact, seen),
    }
    others = {}
    for name, metric in (metrics or {}).items():
        figures = checked_figures(name, metric(exact, seen), len(images))
        by_picture[name], others[name] = figures, median(figures)
    return PictureResult(
        psnr_db=None if psnr.median_db == float("inf") else psnr.median_db,
        ssim=median(value for value in by_picture["ssim"] if value is not None),
        others=others,
        by_picture=by_picture,
    )


def prompt_score(images: Tensor, prompts: list[str], metric: PromptMetric | None) -> float:
    """The mean of `metric` over pictures and their prompts, e.g. a CLIP score.

    Raises: InputError without a metric (its weights do not travel with the package), or if prompts do not match.
    """
    if metric is None:
        raise InputError(
            "a CLIP score needs weights that do not travel with the package: pass metric=, a callable that gives one "
            "figure a picture from (images [B, C, H, W] in [-1, 1], prompts)"
        )
    if len(prompts) != len(images):
        raise InputError(f"{len(prompts)} prompts for {len(images)} images: want one an image")
    figures = checked_figures("prompt metric", metric(images.float().clamp(-1, 1), prompts), len(images))
    return sum(figures) / len(figures)


def checked_figures(name: str, found: Tensor, count: int) -> tuple[float, ...]:
    """`found` as numbers. Raises InputError unless they are `count` finite ones."""
    if not isinstance(found, Tensor) or found.shape != (count,) or not bool(found.isfinite().all()):
        seen = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"metric {name!r} gave {seen} for {count} images: want one finite figure an image, [B]")
    return tuple(float(value) for value in found)


@torch.no_grad()
def _ssim(reference: Tensor, images: Tensor) -> tuple[float, ...]:
    from torchmetrics.functional.image import structural_similarity_index_measure

    reach = min(_REACH, (min(images.shape[-2:]) - 1) // 2)
    if reach < 1:
        raise InputError(f"images of {list(images.shape[-2:])} pixels: SSIM wants at least 3x3")
    found = structural_similarity_index_measure(
        images, reference, sigma=_SIGMA * reach / _REACH, data_range=IMAGE_RANGE, reduction="none"
    )
    assert isinstance(found, Tensor)
    return tuple(float(value) for value in found.reshape(-1))
