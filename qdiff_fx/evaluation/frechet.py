"""How far a network's pictures are from others as a whole: Frechet distance and inception-style score.

Both are torchmetrics' (extra [eval]), fed with the features of any extractor; the extractor's name is in the result.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdiff_fx.errors import InputError
from qdiff_fx.evaluation.features import FeatureExtractor, FeatureStatistics

SPLITS = 10
"""Parts that the score is averaged over (Salimans et al., 2016)."""


@dataclass(frozen=True, kw_only=True)
class DistributionResult:
    """What the pictures of one network are like as a whole.

    Args:
      extractor: name of the network whose features were compared.
      frechet: squared Frechet distance of the Gaussians that the features have the moments of; 0 for equal ones.
      reference: what it is a distance from.
      samples, reference_samples: images on both sides; the distance falls with more of them, so compare equal counts.
      score: exp of the mean KL divergence of a picture's class probabilities from their mean, averaged over splits;
        1 for pictures that are all alike, the number of classes for certain and balanced ones; None without logits.
      score_spread: standard deviation over the splits.
    """

    extractor: str
    frechet: float
    reference: str
    samples: int
    reference_samples: int
    score: float | None = None
    score_spread: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Lines of a table: what, and the figure."""
        lines = [
            (f"Frechet distance, {self.extractor}", f"{self.frechet:.3f}"),
            ("  from", f"{self.reference} ({self.reference_samples:,} images); {self.samples:,} samples"),
        ]
        if self.score is not None:
            lines.append((f"inception-style score, {self.extractor}", f"{self.score:.2f} ± {self.score_spread:.2f}"))
        return lines


def measure_distribution(
    images: Tensor, extractor: FeatureExtractor, reference: FeatureStatistics | None = None
) -> DistributionResult:
    """Frechet distance and, where the extractor classifies, score of `images` [N, C, H, W] in [-1, 1].

    Args:
      reference: None is the extractor's own.

    Raises: InputError if there is no reference, or fewer than two images.
    """
    against = extractor.reference if reference is None else reference
    if against is None:
        raise InputError(
            f"extractor {extractor.name!r} has no reference: pass the statistics of real images or of full-precision "
            "samples of another seed, FeatureStatistics.of(extractor.extract(images), ...)"
        )
    score, spread = (None, None) if extractor.logits is None else inception_style_score(extractor.classify(images))
    return DistributionResult(
        extractor=extractor.name,
        frechet=frechet_distance(extractor.extract(images), against),
        reference=against.description,
        samples=len(images),
        reference_samples=against.count,
        score=score,
        score_spread=spread,
    )


def frechet_distance(features: Tensor, reference: FeatureStatistics) -> float:
    """|m - m_r|^2 + tr(C + C_r - 2 (C C_r)^0.5), in fp64 (Heusel et al., 2017, equation 6).

    Args:
      features: [N, D], N >= 2.
      reference: of D features.

    Raises: InputError if the shapes do not fit.
    """
    if features.dim() != 2 or len(features) < 2 or features.shape[1] != len(reference.mean):
        raise InputError(f"features of shape {list(features.shape)}: want [N, {len(reference.mean)}] with N >= 2")
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(features.shape[1]))
    mean, covariance, count = reference.mean.double(), reference.covariance.double(), reference.count
    metric.real_features_sum = mean * count
    metric.real_features_cov_sum = covariance * (count - 1) + count * torch.outer(mean, mean)
    metric.real_features_num_samples = torch.tensor(count)
    metric.update(features.to(torch.float64), real=False)
    return float(metric.compute())


def inception_style_score(logits: Tensor, *, splits: int = SPLITS, seed: int = 0) -> tuple[float, float]:
    """The score and its standard deviation over `splits` parts of the pictures.

    Args:
      logits: [N, classes], N >= 2.
      splits: 2..N.
      seed: of the shuffling before the pictures are parted.

    Raises: InputError if the shape does not fit.
    """
    if logits.dim() != 2 or len(logits) < 2 or splits < 2:
        raise InputError(f"logits of shape {list(logits.shape)}, {splits} splits: want [N, classes], both at least 2")
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `InceptionScore` will save all extracted features")  # they are small
        metric = InceptionScore(feature=_Given(logits.shape[1]), splits=min(splits, len(logits)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the metric shuffles with the global generator
        metric.update(logits.to(torch.float64))
        parts = metric.compute()
    return float(parts[0]), float(parts[1])


class _Given(nn.Module):
    """Stands in for a network where the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
