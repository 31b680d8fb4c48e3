"""Frechet distance, score and intervals against what can be worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qdiff_fx.errors import CheckpointError, InputError, NonFiniteError
from qdiff_fx.evaluation import (
    FeatureExtractor,
    FeatureStatistics,
    Interval,
    fashion_features,
    frechet_distance,
    from_bytes,
    inception_style_score,
    measure_distribution,
    sample_in_chunks,
)


def gaussian(rows: int, mean: list[float], deviation: list[float], seed: int = 0) -> Tensor:
    """Rows whose sample mean and covariance are exactly the asked ones."""
    drawn = torch.randn(rows, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = drawn - drawn.mean(0)
    drawn = drawn @ torch.linalg.inv(torch.linalg.cholesky(drawn.T.cov())).T
    return drawn * torch.tensor(deviation, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


def test_the_distance_of_two_gaussians_is_the_closed_form() -> None:
    reference = FeatureStatistics.of(gaussian(50, [0.0, 1.0], [1.0, 2.0]), "reference")
    features = gaussian(70, [3.0, 1.0], [4.0, 2.0], seed=1)
    # |m - m_r|^2 = 9; diagonal covariances add (s - s_r)^2 = 9.
    assert frechet_distance(features, reference) == pytest.approx(18.0, abs=1e-6)
    assert frechet_distance(gaussian(50, [0.0, 1.0], [1.0, 2.0]), reference) == pytest.approx(0.0, abs=1e-6)


def test_the_score_counts_certain_and_balanced_classes() -> None:
    certain = 50.0 * torch.eye(4).repeat(1000, 1)
    # Shuffled halves of 2,000 are balanced to a percent or so, and balance enters in the second order.
    assert inception_style_score(certain, splits=2)[0] == pytest.approx(4.0, rel=1e-2)
    assert inception_style_score(certain[:, :1].expand(-1, 4), splits=2) == pytest.approx((1.0, 0.0), abs=1e-6)
    with pytest.raises(InputError, match="both at least 2"):
        inception_style_score(certain, splits=1)


def test_the_score_leaves_the_global_generator_as_it_was() -> None:
    state = torch.get_rng_state()
    inception_style_score(torch.eye(4))
    assert torch.equal(state, torch.get_rng_state())


def test_a_result_says_whose_features_and_which_reference() -> None:
    extractor = FeatureExtractor(name="two pixels", features=lambda images: images.flatten(1)[:, :2])
    images = torch.rand(8, 1, 4, 4)
    reference = FeatureStatistics.of(extractor.extract(images), "the same pictures")
    result = measure_distribution(images, extractor, reference)
    assert (result.extractor, result.reference, result.samples) == ("two pixels", "the same pictures", 8)
    assert result.frechet == pytest.approx(0.0, abs=1e-6)
    assert result.score is None
    assert "two pixels" in result.rows()[0][0]
    with pytest.raises(InputError, match="has no reference"):
        measure_distribution(images, extractor)


@pytest.mark.parametrize(
    ("features", "error"),
    [
        (lambda images: images, InputError),
        (lambda images: images.flatten(1) / 0.0, NonFiniteError),
    ],
    ids=["not-flat", "not-finite"],
)
def test_a_bad_extractor_is_named(features: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="'odd'"):
        FeatureExtractor(name="odd", features=features).extract(torch.ones(2, 1, 4, 4))  # type: ignore[arg-type]


def test_bundled_features_are_white_over_clothes_and_far_from_noise() -> None:
    extractor = fashion_features()
    assert extractor.reference is not None
    assert extractor.reference.count == 10_000
    # Whitened over the training images, so the test images are nearly white: mean 0, variance 1 in most directions.
    assert float(extractor.reference.mean.norm()) < 0.5
    assert float(extractor.reference.covariance.diagonal().median()) == pytest.approx(1.0, abs=0.2)
    noise = measure_distribution(torch.randn(300, 1, 28, 28).clamp(-1, 1), extractor)
    grey = measure_distribution(torch.zeros(300, 1, 28, 28), extractor)
    assert noise.frechet > 50 and grey.frechet > 50
    assert grey.score == pytest.approx(1.0, abs=1e-3)
    assert "Fashion-MNIST" in noise.extractor


def test_an_interval_is_student_s() -> None:
    interval = Interval.over([1.0, 2.0, 3.0])
    # t(0.975, 2 degrees of freedom) = 4.303, standard error 1 / sqrt(3).
    assert interval.high == pytest.approx(2.0 + 4.303 / math.sqrt(3))
    assert interval.text() == "2.00 ± 2.48"
    assert Interval.over([5.0]).low is None
    with pytest.raises(InputError, match="finite"):
        Interval.over([1.0, math.inf])


class Counting(nn.Module):
    """A sampler that gives its noise back, and counts pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0

    def forward(self, noise: Tensor) -> Tensor:
        self.drawn += len(noise)
        return noise


def test_finished_chunks_are_kept_and_the_next_ones_added(tmp_path: Path) -> None:
    sampler = Counting()
    some = sample_in_chunks(sampler, (1, 2, 2), count=4, seed=0, chunk=2, folder=tmp_path, identity="a")
    more = sample_in_chunks(sampler, (1, 2, 2), count=6, seed=0, chunk=2, folder=tmp_path, identity="a")
    assert sampler.drawn == 6
    assert torch.equal(more[:4], some)
    assert torch.equal(more, sample_in_chunks(Counting(), (1, 2, 2), count=6, seed=0, chunk=2))
    with pytest.raises(CheckpointError, match="another network"):
        sample_in_chunks(sampler, (1, 2, 2), count=6, seed=0, chunk=2, folder=tmp_path, identity="b")


def test_pictures_in_bytes_are_within_half_a_grey_level() -> None:
    drawn = sample_in_chunks(lambda noise: noise.clamp(-1, 1), (1, 8, 8), count=2, seed=3, chunk=2)
    exact = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3 * 1_000_003)).clamp(-1, 1)
    assert float((from_bytes(drawn) - exact).abs().max()) <= 0.5 / 127.5 + 1e-6
    with pytest.raises(NonFiniteError, match="diverged"):
        sample_in_chunks(lambda noise: noise * math.nan, (1, 2, 2), count=1, seed=0)
