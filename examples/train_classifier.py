"""Train the classifier that judges sampled images, and write down how well it does.

    python examples/train_classifier.py OUT_DIR

Writes OUT_DIR/classifier.safetensors (fp16) and OUT_DIR/classifier.json (its figures on the test images, measured
with the fp16 weights as they are loaded again). Data: Fashion-MNIST, Debian package `dataset-fashion-mnist`.
Images are mirrored at random, because the bundled unconditional model was trained on mirrored images too.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from qdiff_fx.evaluation.classifier import FashionClassifier, asked_class_share, confident_share
from qdiff_fx.evaluation.fashion_mnist import DEBIAN_FOLDER, read_fashion_mnist

LOGGER = logging.getLogger(__name__)


def train(
    images: Tensor, labels: Tensor, *, epochs: int, batch_size: int, peak_rate: float, seed: int
) -> tuple[FashionClassifier, float]:
    """A trained classifier in eval mode, and the mean loss of its last epoch."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = FashionClassifier()
    as_module: Any = classifier  # torch's annotations of .to() lack memory_format alone
    as_module.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=peak_rate, weight_decay=1e-2)
    batches = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=epochs * batches)
    mean_loss = float("nan")
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)[: batches * batch_size].view(batches, batch_size)
        total = 0.0
        for indices in tqdm(order, desc=f"epoch {epoch + 1} of {epochs}", mininterval=10):
            mirrored = torch.rand(batch_size, generator=generator) < 0.5
            batch = torch.where(mirrored[:, None, None, None], images[indices].flip(-1), images[indices])
            logits = classifier(batch.to(memory_format=torch.channels_last))
            loss: Any = torch.nn.functional.cross_entropy(logits, labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        mean_loss = total / batches
        LOGGER.info("epoch %d: mean loss %.4f", epoch + 1, mean_loss)
    return classifier.eval(), mean_loss


def store(classifier: FashionClassifier, path: Path) -> None:
    """Write the weights in fp16; the batch counters of the normalisation stay integers."""
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in classifier.state_dict().items()
    }
    save_file(state, path, metadata={"format": "pt"})


def main() -> None:
    """Train, store, load again, measure, write the figures."""
    parser = argparse.ArgumentParser(description="Train the bundled Fashion-MNIST classifier.")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the four *-ubyte.gz files")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--peak-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = {name: getattr(arguments, name) for name in ("epochs", "batch_size", "peak_rate", "seed")}
    began = time.perf_counter()
    trained, loss = train(*read_fashion_mnist(arguments.data, "train"), **settings)
    seconds = time.perf_counter() - began
    arguments.out.mkdir(parents=True, exist_ok=True)
    store(trained, arguments.out / "classifier.safetensors")
    stored = FashionClassifier().eval()
    stored.load_state_dict(load_file(arguments.out / "classifier.safetensors"))
    images, labels = read_fashion_mnist(arguments.data, "test")
    figures = {
        "test_accuracy": asked_class_share(images, labels, stored),
        "test_images_above_0.9_confidence": confident_share(images, 0.9, stored),
        "last_epoch_mean_loss": round(loss, 4),
        "training_seconds_on_the_machine_that_trained_it": round(seconds),
        "settings": settings,
    }
    (arguments.out / "classifier.json").write_text(json.dumps(figures, indent=2) + "\n")
    LOGGER.info("%s", json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
