"""The range search, against the published one written out channel by channel."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from qdiff_fx.errors import QuantSpecError
from qdiff_fx.numerics import search
from qdiff_fx.numerics.affine import QParams, check_qparams, fake_quantize, qparams_from_range
from qdiff_fx.numerics.search import search_mse
from qdiff_fx.numerics.spec import QuantSpec, activation_spec, probability_spec, weight_spec

SPECS = [activation_spec(8), activation_spec(4), QuantSpec(bits=4, signed=True, symmetric=True), probability_spec(8)]

# Errors of two grids are sums in float32 blocks: equal up to this.
SUM_ROUNDING = 1.0 + 1e-5


def error(x: Tensor, grid: QParams, spec: QuantSpec) -> float:
    """Mean |x - q|^2.4, as published, in float64."""
    return float((fake_quantize(x, *grid, spec).double() - x.double()).abs().pow(2.4).mean())


def values(largest: float = 1e6) -> st.SearchStrategy[Tensor]:
    elements = st.floats(-largest, largest, width=32).map(lambda value: 0.0 if abs(value) < 1e-6 else value)
    return arrays(np.float32, array_shapes(min_dims=1, max_dims=1, max_side=40), elements=elements).map(
        torch.from_numpy
    )


@given(values(), st.sampled_from(SPECS))
@settings(max_examples=40)
def test_never_worse_than_min_max(x: Tensor, spec: QuantSpec) -> None:
    assert (
        error(x, search_mse(x, spec), spec) <= error(x, qparams_from_range(x.min(), x.max(), spec), spec) * SUM_ROUNDING
    )


@given(values(), st.integers(1, 39), st.sampled_from(SPECS))
@settings(max_examples=25)
def test_a_part_is_never_worse_than_joint_when_the_joint_grid_is_a_candidate(
    x: Tensor, first: int, spec: QuantSpec
) -> None:
    assume(first < x.numel())
    joint = search_mse(x, spec)
    for part in (x[:first], x[first:]):
        assert error(part, search_mse(part, spec, extra=joint), spec) <= error(part, joint, spec) * SUM_ROUNDING


def test_equals_the_published_search_channel_by_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 200, generator=generator) * torch.exp(torch.randn(6, 1, generator=generator))
    spec = weight_spec(4)
    found = search_mse(x, spec)
    tensor_spec = activation_spec(4)
    for channel, row in enumerate(x):
        candidates = [
            qparams_from_range(row.min() * (1.0 - 0.01 * step), row.max() * (1.0 - 0.01 * step), tensor_spec)
            for step in range(80)
        ]
        best = min(candidates, key=lambda grid: error(row, grid, tensor_spec))
        torch.testing.assert_close(found.scale[channel], best.scale, rtol=2.0**-22, atol=0.0)
        assert found.zero_point[channel] == best.zero_point


def test_clips_an_outlier_that_costs_more_than_it_brings() -> None:
    x = torch.cat([torch.randn(10_000, generator=torch.Generator().manual_seed(0)), torch.tensor([12.0])])
    spec = activation_spec(4)
    assert error(x, search_mse(x, spec), spec) < 0.7 * error(x, qparams_from_range(x.min(), x.max(), spec), spec)


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_result_does_not_depend_on_the_block_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    whole = search_mse(x, weight_spec(4))
    monkeypatch.setattr(search, "_BLOCK_VALUES", block)
    blocked = search_mse(x, weight_spec(4))
    assert torch.equal(whole.scale, blocked.scale) and torch.equal(whole.zero_point, blocked.zero_point)


@pytest.mark.parametrize("spec", [weight_spec(4), weight_spec(8), activation_spec(8), probability_spec(8)], ids=str)
def test_extreme_channels_get_usable_grids(spec: QuantSpec) -> None:
    largest, smallest = float(np.finfo(np.float32).max), 2.0**-149
    x = torch.tensor(
        [[0.0] * 4, [2.0] * 4, [1, 2, 3, 4], [-1, -2, -3, -4], [smallest, 0, 0, -smallest], [-largest, 0, 1, largest]]
    )
    grid = search_mse(x, spec)
    check_qparams(*grid, spec, "layer")
    assert torch.isfinite(fake_quantize(x, *(part[:, None] for part in grid), spec)).all()


def test_a_given_range_is_the_one_that_shrinks() -> None:
    x, spec = torch.tensor([0.0, 0.5, 1.0]), activation_spec(8)
    grid = search_mse(x, spec, candidates=1, minimum=torch.tensor(-1.0), maximum=torch.tensor(4.0))
    assert torch.equal(grid.scale, qparams_from_range(torch.tensor(-1.0), torch.tensor(4.0), spec).scale)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 4), ()])
def test_empty_and_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(QuantSpecError, match=r"want values in \[C, N\] or \[N\]"):
        search_mse(torch.zeros(shape), activation_spec(8))


def test_nan_is_refused() -> None:
    with pytest.raises(QuantSpecError, match="want finite"):
        search_mse(torch.tensor([1.0, float("nan")]), activation_spec(8))
