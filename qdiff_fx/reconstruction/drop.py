"""QDrop: while rounding is learned, activations are quantized at random only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qdiff_fx.fake_quantize import ActivationQuantizer


@contextmanager
def dropped(quantizers: Sequence[ActivationQuantizer], probability: float | None, seed: int) -> Iterator[None]:
    """Within the block each element passes its quantizer unrounded with `probability`.

    Wei et al. 2022, "QDrop". Departure: the block's input is the quantized stream's, not mixed with the other one's.
    """
    generator = torch.Generator(quantizers[0].scale.device if quantizers else "cpu").manual_seed(seed)

    def mix(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert probability is not None
        drop = torch.empty(output.shape, device=output.device).bernoulli_(probability, generator=generator)
        return torch.where(drop.bool(), inputs[0], output)

    handles = [item.register_forward_hook(mix) for item in quantizers] if probability else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
