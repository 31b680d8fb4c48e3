"""Feature extractors of distribution metrics, and the statistics of what they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff_fx.assets import classifier_path
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.errors import InputError, NonFiniteError
from qdiff_fx.evaluation.classifier import load_classifier
from qdiff_fx.safe_io import read_json, read_tensors

STATISTICS_FILE = "features.safetensors"
DESCRIPTION_FILE = "features.json"


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Mean and covariance of features, all that a Frechet distance needs of one side.

    Args:
      description: what the images were; goes into every result.
      mean: [D], fp64.
      covariance: [D, D], fp64, unbiased.
      count: images.
    """

    description: str
    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor, description: str) -> FeatureStatistics:
        """The statistics of `features` [N, D]. Raises InputError for fewer than two rows."""
        if features.dim() != 2 or len(features) < 2:
            raise InputError(f"features of shape {list(features.shape)}: want [N, D] with N >= 2")
        wide = features.to(torch.float64)
        return cls(description=description, mean=wide.mean(0), covariance=wide.T.cov(), count=len(wide))


@dataclass(frozen=True, kw_only=True)
class FeatureExtractor:
    """What turns images into features; its name goes into every result.

    Args:
      name: of network and features, e.g. "Inception-v3 pool3". Only Inception's distance is called FID.
      features: [B, D] from images [B, C, H, W] in [-1, 1]; in eval mode.
      logits: [B, classes] from the same images, for the inception-style score; None if there is no classifier.
      reference: of real images; None compares with samples of the full-precision network.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor] | None = None
    reference: FeatureStatistics | None = None

    @torch.no_grad()
    def extract(self, images: Tensor, *, batch_size: int = 250) -> Tensor:
        """Features [N, D], fp64, of `images` [N, C, H, W] (what lies outside [-1, 1] is clamped).

        Raises: NonFiniteError if images or features hold NaN or infinity; InputError unless there are [N, D] of them.
        """
        return self._run(self.features, images, batch_size)

    @torch.no_grad()
    def classify(self, images: Tensor, *, batch_size: int = 250) -> Tensor:
        """Logits [N, classes], fp64. Raises InputError without a classifier, and as `extract` does."""
        if self.logits is None:
            raise InputError(f"extractor {self.name!r} has no logits: pass FeatureExtractor(logits=...) for a score")
        return self._run(self.logits, images, batch_size)

    def _run(self, network: Callable[[Tensor], Tensor], images: Tensor, batch_size: int) -> Tensor:
        if not bool(images.isfinite().all()):
            raise NonFiniteError("images hold NaN or infinity: want finite pixels in [-1, 1]; the sampler diverged")
        parts = []
        with progress_bar("features", total=len(images), progress=None) as bar:
            for batch in torch.split(images, batch_size):
                parts.append(network(batch.float().clamp(-1, 1)))
                bar.update(len(batch))
        found = torch.cat(parts)
        if found.dim() != 2 or len(found) != len(images):
            raise InputError(
                f"extractor {self.name!r} gave {list(found.shape)} for {len(images)} images: want [N, D]; flatten it"
            )
        if not bool(found.isfinite().all()):
            raise NonFiniteError(f"extractor {self.name!r} gave NaN or infinity: check its weights and eval mode")
        return found.to(torch.float64)


class WhitenedFeatures(nn.Module):
    """(f(x) - mean) W: features whose covariance over the images that `mean` and `whitening` are of is the identity.

    Unwhitened, a handful of channels with large activations would decide the distance alone.

    Args:
      features: gives [B, D].
      mean: [D].
      whitening: [D, D], the inverse square root of the covariance.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, features: nn.Module, mean: Tensor, whitening: Tensor) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("mean", mean)
        self.register_buffer("whitening", whitening)

    def forward(self, images: Tensor) -> Tensor:
        """[B, D], fp64, of `images` [B, C, H, W]."""
        found: Tensor = (self.features(images).to(torch.float64) - self.mean) @ self.whitening
        return found


def fashion_features() -> FeatureExtractor:
    """The pooled features of the bundled Fashion-MNIST classifier, whitened over the training images.

    The reference is the 10,000 test images; statistics of both travel with the package
    (examples/feature_statistics.py made them).
    """
    folder = classifier_path()
    tensors, description = read_tensors(folder / STATISTICS_FILE), read_json(folder / DESCRIPTION_FILE)
    classifier = load_classifier()
    return FeatureExtractor(
        name=str(description["extractor"]),
        features=WhitenedFeatures(classifier.features, tensors["mean"], tensors["whitening"]).eval(),
        logits=classifier,
        reference=FeatureStatistics(
            description=str(description["reference"]),
            mean=tensors["reference_mean"],
            covariance=tensors["reference_covariance"],
            count=int(description["reference_images"]),
        ),
    )
