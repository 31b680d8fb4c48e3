"""Make the statistics that the Frechet distance on Fashion-MNIST needs, from the data set's own files.

    python examples/feature_statistics.py qdiff_fx/assets/fashion_classifier --data FOLDER

Whitens the pooled features of the bundled classifier over the 60,000 training images, and keeps mean and covariance of
the 10,000 test images' whitened features: the reference. Writes features.safetensors and features.json, in which
`floor` holds the distance of so many training images from the reference: no sampler can be expected to come closer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from qdiff_fx.evaluation import load_classifier
from qdiff_fx.evaluation.fashion_mnist import DEBIAN_FOLDER, read_fashion_mnist
from qdiff_fx.evaluation.features import (
    DESCRIPTION_FILE,
    STATISTICS_FILE,
    FeatureExtractor,
    FeatureStatistics,
    WhitenedFeatures,
)
from qdiff_fx.evaluation.frechet import frechet_distance
from qdiff_fx.safe_io import write_json, write_tensors

EXTRACTOR = "pooled features of the bundled Fashion-MNIST classifier, whitened"
REFERENCE = "Fashion-MNIST test images"
SILENT = 1e-6
"""Directions with less variance than this share of the largest are left out, not blown up."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER)
    arguments = parser.parse_args()
    classifier = load_classifier()
    plain = FeatureExtractor(name="unwhitened", features=classifier.features)
    train, _ = read_fashion_mnist(arguments.data, "train")
    test, labels = read_fashion_mnist(arguments.data, "test")
    trained = plain.extract(train)
    statistics = FeatureStatistics.of(trained, "training images")
    values, vectors = torch.linalg.eigh(statistics.covariance)
    kept = values > SILENT * values.max()
    scales = torch.where(kept, values.clamp(min=1e-30).rsqrt(), torch.zeros_like(values))
    whitening = vectors * scales @ vectors.T
    network = WhitenedFeatures(classifier.features, statistics.mean, whitening)
    reference = FeatureStatistics.of(FeatureExtractor(name=EXTRACTOR, features=network).extract(test), REFERENCE)
    whitened = (trained - statistics.mean) @ whitening
    order = torch.randperm(len(whitened), generator=torch.Generator().manual_seed(0))
    floor = {str(count): frechet_distance(whitened[order[:count]], reference) for count in (1000, 2000, 5000, 10000)}
    with torch.no_grad():
        right = classifier.head((plain.extract(test)).float()).argmax(1) == labels
    write_tensors(
        arguments.out / STATISTICS_FILE,
        {
            "mean": statistics.mean,
            "whitening": whitening,
            "reference_mean": reference.mean,
            "reference_covariance": reference.covariance,
        },
    )
    description = {
        "extractor": EXTRACTOR,
        "reference": REFERENCE,
        "reference_images": len(test),
        "directions": int(kept.sum()),
        "test_accuracy": float(right.double().mean()),
        "floor": floor,
    }
    write_json(arguments.out / DESCRIPTION_FILE, description)
    print(description)


if __name__ == "__main__":
    main()
