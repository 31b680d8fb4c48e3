"""The bundled classifier, and the shares that are computed with it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qdiff_fx.assets import classifier_path
from qdiff_fx.errors import InputError
from qdiff_fx.evaluation.classifier import asked_class_share, classify, confident_share, load_classifier
from qdiff_fx.evaluation.fashion_mnist import DEBIAN_FOLDER, read_fashion_mnist


class FirstPixels(nn.Module):
    """Takes the first ten pixels of an image as its logits, 10 for white and -10 for black."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :10] * self.gain


def images_of(classes: list[int], pixel: float = 1.0) -> Tensor:
    images = torch.full((len(classes), 1, 28, 28), -1.0)
    images[range(len(classes)), 0, 0, classes] = pixel
    return images


def test_the_bundled_weights_are_fp16_and_under_one_megabyte() -> None:
    path = classifier_path() / "classifier.safetensors"
    weights = load_file(path)
    assert path.stat().st_size < 1_000_000
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}


def test_the_written_accuracy_is_at_least_ninety_percent() -> None:
    assert json.loads((classifier_path() / "classifier.json").read_text())["test_accuracy"] >= 0.9


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_accuracy_on_test_images_is_the_written_one() -> None:
    images, labels = read_fashion_mnist(DEBIAN_FOLDER, "test")
    written = json.loads((classifier_path() / "classifier.json").read_text())
    # 2,000 of the 10,000 images: four standard errors of a share of 0.93 are 0.023.
    share = asked_class_share(images[:2000], labels[:2000], load_classifier())
    assert share == pytest.approx(written["test_accuracy"], abs=0.023)


def test_the_loaded_classifier_is_fp32_in_eval_mode() -> None:
    classifier = load_classifier()
    assert not any(module.training for module in classifier.modules())
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}


def test_probabilities_sum_to_one_and_do_not_depend_on_the_batching() -> None:
    images = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    probabilities = classify(images)
    assert probabilities.shape == (5, 10)
    # fp32 sums of ten terms of at most 1; another batch size may pick another convolution algorithm.
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(classify(images, batch_size=2), probabilities, rtol=0, atol=1e-5)


def test_pixels_outside_the_range_are_clamped() -> None:
    assert torch.equal(classify(images_of([3], pixel=5.0), FirstPixels()), classify(images_of([3]), FirstPixels()))


def test_confident_share_counts_images_above_the_threshold() -> None:
    # White on black: probability above 0.99. Black on black: 0.1 for every class.
    images = torch.cat([images_of([0, 4, 9]), images_of([1], pixel=-1.0)])
    assert confident_share(images, classifier=FirstPixels()) == 0.75
    assert confident_share(images, 0.05, FirstPixels()) == 1.0


def test_asked_class_share_counts_images_of_the_asked_class() -> None:
    assert asked_class_share(images_of([0, 4, 9, 2]), [0, 4, 9, 3], FirstPixels()) == 0.75
    assert asked_class_share(images_of([0, 4]), torch.tensor([0, 4]), FirstPixels()) == 1.0


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 3, 28, 28), (2, 1, 32, 32), (0, 1, 28, 28)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="want \\[B, 1, 28, 28\\]"):
        classify(torch.zeros(shape), FirstPixels())


def test_images_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        classify(images_of([1], pixel=float("nan")), FirstPixels())


def test_another_number_of_labels_is_refused() -> None:
    with pytest.raises(InputError, match="one label an image"):
        asked_class_share(images_of([1, 2]), [1], FirstPixels())
