"""A small Fashion-MNIST classifier: does a sampled image still look like the clothes it should be?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qdiff_fx.assets import classifier_path
from qdiff_fx.errors import InputError


class FashionClassifier(nn.Module):
    """Class logits [B, 10] from grey-scale images [B, 1, 28, 28] in [-1, 1].

    Four 3x3 convolutions over 28x28, 14x14 and 7x7 pixels with batch normalisation, then global average pooling.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_stage(1, 32),
            nn.MaxPool2d(2),
            *_stage(32, 64),
            nn.MaxPool2d(2),
            *_stage(64, 128),
            *_stage(128, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of `images` [B, 1, 28, 28] in [-1, 1]."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _stage(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out_channels), nn.ReLU()


def load_classifier() -> FashionClassifier:
    """The bundled classifier, in fp32 and eval mode; its accuracy stands in classifier.json beside its weights."""
    classifier = FashionClassifier()
    classifier.load_state_dict(load_file(classifier_path() / "classifier.safetensors"))
    return classifier.eval()


@torch.no_grad()
def classify(images: Tensor, classifier: nn.Module | None = None, *, batch_size: int = 256) -> Tensor:
    """Class probabilities [B, 10], fp32, of images [B, 1, 28, 28] in [-1, 1] (what lies outside is clamped).

    Args:
      images: on any device; moved to the classifier's.
      classifier: gives logits and is in eval mode; None loads the bundled one.
      batch_size: images to a forward pass.

    Raises: InputError if `images` are of another shape or not finite.
    """
    if images.dim() != 4 or images.shape[1:] != (1, 28, 28) or len(images) == 0:
        raise InputError(f"images of shape {list(images.shape)}: want [B, 1, 28, 28] with B >= 1")
    if not bool(images.isfinite().all()):
        raise InputError("images hold NaN or infinity: want finite pixels in [-1, 1]; the sampler diverged")
    network = load_classifier() if classifier is None else classifier
    device = next(network.parameters()).device
    logits = [network(batch.to(device, torch.float32).clamp(-1, 1)) for batch in torch.split(images, batch_size)]
    return torch.cat(logits).softmax(1)


def confident_share(images: Tensor, threshold: float = 0.9, classifier: nn.Module | None = None) -> float:
    """The share, 0..1, of `images` whose likeliest class has a probability above `threshold`."""
    return float((classify(images, classifier).amax(1) > threshold).double().mean())


def asked_class_share(images: Tensor, labels: Sequence[int] | Tensor, classifier: nn.Module | None = None) -> float:
    """The share, 0..1, of `images` whose likeliest class is the one of `labels` [B] that was asked for.

    Raises: InputError unless there is one label for each image.
    """
    asked = torch.as_tensor(labels)
    if asked.shape != (len(images),):
        raise InputError(f"labels of shape {list(asked.shape)} for {len(images)} images: want one label an image")
    found = classify(images, classifier).argmax(1)
    return float((found == asked.to(found.device)).double().mean())
