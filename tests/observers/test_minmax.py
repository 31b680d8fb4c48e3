"""The min-max observer."""

import torch

from qdiff_fx.numerics.affine import fake_quantize
from qdiff_fx.numerics.spec import activation_spec
from qdiff_fx.observers import MinMaxObserver


def test_nothing_seen_saturates() -> None:
    observer = MinMaxObserver(activation_spec(8))
    data = [torch.randn(50, generator=torch.Generator().manual_seed(index)) * 3**index for index in range(4)]
    for batch in data:
        observer.observe(batch)
    scale, zero_point = observer.qparams()
    for batch in data:
        error = fake_quantize(batch, scale, zero_point, observer.spec) - batch
        assert error.abs().max() <= scale * (0.5 + 256 * 3 * 2.0**-24)
