"""The percentile observer."""

import numpy as np
import pytest
import torch

from qdiff_fx.errors import ConfigError
from qdiff_fx.numerics.affine import qparams_from_range
from qdiff_fx.numerics.spec import activation_spec, weight_spec
from qdiff_fx.observers import PercentileObserver


def test_covers_what_numpy_says() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    observer = PercentileObserver(activation_spec(8), percentile=99.0)
    observer.observe(x)
    low, high = np.percentile(x.numpy(), [1.0, 99.0], method="closest_observation")
    expected = qparams_from_range(torch.tensor(low), torch.tensor(high), activation_spec(8))
    # Neighbouring values of the sample lie about 1e-2 apart out there.
    torch.testing.assert_close(observer.qparams().scale, expected.scale, rtol=5e-3, atol=0.0)


def test_an_outlier_is_left_out_by_channel() -> None:
    x = torch.rand(3, 5000, generator=torch.Generator().manual_seed(0))
    x[1, 17] = 1000.0
    observer = PercentileObserver(weight_spec(8))
    observer.observe(x)
    assert (observer.qparams().scale <= 1.0 / 127).all()


def test_a_tensor_of_zeros_with_a_few_values_keeps_them() -> None:
    x = torch.zeros(100_000)
    x[5] = 7.0
    observer = PercentileObserver(activation_spec(8))
    observer.observe(x)
    assert observer.qparams().scale == torch.tensor(7.0 / 255)


@pytest.mark.parametrize("percentile", [50.0, 100.1, float("nan")])
def test_a_percentile_outside_50_100_is_refused(percentile: float) -> None:
    with pytest.raises(ConfigError, match=r"want a number in \(50, 100\]"):
        PercentileObserver(activation_spec(8), percentile=percentile)
