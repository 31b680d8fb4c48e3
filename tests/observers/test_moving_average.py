"""The moving-average observer."""

import pytest
import torch

from qdiff_fx.errors import ConfigError
from qdiff_fx.numerics.affine import qparams_from_range
from qdiff_fx.numerics.spec import activation_spec
from qdiff_fx.observers import MovingAverageObserver


def test_range_is_the_exponential_average_of_batch_ranges() -> None:
    observer = MovingAverageObserver(activation_spec(8), momentum=0.25)
    for low, high in [(-1.0, 4.0), (-2.0, 8.0), (0.0, 16.0)]:
        observer.observe(torch.tensor([low, high]))
    expected = qparams_from_range(
        torch.tensor((-1.0 * 0.75 - 2.0 * 0.25) * 0.75),
        torch.tensor((4.0 * 0.75 + 8.0 * 0.25) * 0.75 + 16.0 * 0.25),
        activation_spec(8),
    )
    assert torch.equal(observer.qparams().scale, expected.scale)
    assert observer.maximum == 16.0


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.1, float("nan")])
def test_a_momentum_outside_0_1_is_refused(momentum: float) -> None:
    with pytest.raises(ConfigError, match=r"want a number in \(0, 1\]"):
        MovingAverageObserver(activation_spec(8), momentum=momentum)
