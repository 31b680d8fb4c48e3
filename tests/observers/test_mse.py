"""The MSE observer."""

import pytest
import torch

from qdiff_fx.errors import CalibrationError
from qdiff_fx.numerics.affine import fake_quantize, qparams_from_range
from qdiff_fx.numerics.search import search_mse
from qdiff_fx.numerics.spec import activation_spec, weight_spec
from qdiff_fx.observers import MSEObserver


def test_a_weight_gets_the_exact_search() -> None:
    weight = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    observer = MSEObserver(weight_spec(4))
    observer.observe(weight)
    expected = search_mse(weight.flatten(1), weight_spec(4))
    assert torch.equal(observer.qparams().scale, expected.scale)
    assert torch.equal(observer.qparams().zero_point, expected.zero_point)


def test_a_weight_is_neither_copied_nor_kept_after_it_was_fitted() -> None:
    weight = torch.randn(5, 40)
    observer = MSEObserver(weight_spec(4))
    observer.observe(weight)
    assert observer._weight is not None and observer._weight.data_ptr() == weight.data_ptr()
    observer.qparams()
    assert observer._weight is None


def test_a_weight_that_was_not_fitted_before_saving_is_asked_for_again() -> None:
    observer = MSEObserver(weight_spec(4))
    observer.observe(torch.randn(5, 40))
    restored = MSEObserver(weight_spec(4))
    restored.name = "conv_in"
    restored.load_state_dict(observer.state_dict())
    with pytest.raises(CalibrationError, match="conv_in: restored before its weight was fitted"):
        restored.qparams()


def test_beats_min_max_on_activations_with_rare_outliers() -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(20_000, generator=generator) for _ in range(10)]
    data[3][5] = 15.0
    spec, everything = activation_spec(4), torch.cat(data)
    observer = MSEObserver(spec)
    for batch in data:
        observer.observe(batch)

    def error(grid: tuple[torch.Tensor, torch.Tensor]) -> float:
        return float((fake_quantize(everything, *grid, spec) - everything).square().mean())

    assert error(observer.qparams()) < 0.5 * error(qparams_from_range(everything.min(), everything.max(), spec))
