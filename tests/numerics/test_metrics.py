"""Decibels of known ratios."""

from math import inf, isnan, nan

import pytest
import torch

from qdiff_fx.errors import InputError
from qdiff_fx.numerics.metrics import psnr_db, sqnr_db


def test_sqnr_of_a_tenth_of_the_amplitude_is_20_db() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sqnr_db(x, x * 0.9) == pytest.approx(20.0, abs=1e-9)


def test_psnr_of_a_hundredth_of_the_range_is_40_db() -> None:
    x = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    assert psnr_db(x, x + 0.02, data_range=2.0) == pytest.approx(40.0, abs=1e-9)


def test_equal_tensors_are_infinitely_close_and_noise_on_nothing_infinitely_far() -> None:
    x = torch.ones(3)
    assert sqnr_db(x, x) == inf
    assert psnr_db(x, x, data_range=1.0) == inf
    assert sqnr_db(torch.zeros(3), x) == -inf


def test_sums_are_float64() -> None:
    # In float16 the squares overflow, in float32 the sum of a million ones beside 2^24 stalls.
    x = torch.full((1_000_000,), 300.0, dtype=torch.float16)
    assert sqnr_db(x, x * 0) == pytest.approx(0.0, abs=1e-12)
    tail = torch.cat([torch.tensor([4096.0]), torch.ones(1_000_000)])
    assert sqnr_db(tail, torch.zeros_like(tail)) == pytest.approx(0.0, abs=1e-12)


def test_nan_shows() -> None:
    assert isnan(sqnr_db(torch.ones(2), torch.tensor([1.0, nan])))


def test_shapes_and_ranges_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"shapes \(2,\) and \(3,\)"):
        sqnr_db(torch.ones(2), torch.ones(3))
    with pytest.raises(InputError, match="want a positive range"):
        psnr_db(torch.ones(2), torch.ones(2), data_range=0.0)
    with pytest.raises(InputError, match="want a positive range"):
        psnr_db(torch.ones(0), torch.ones(0), data_range=1.0)
