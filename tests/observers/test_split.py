"""The split observer."""

import pytest
import torch
from torch import Tensor

from qdiff_fx.errors import ConfigError, InputError, NonFiniteError
from qdiff_fx.numerics.affine import along_axis, fake_quantize
from qdiff_fx.numerics.spec import activation_spec, weight_spec
from qdiff_fx.observers import MinMaxObserver, MSEObserver, SplitObserver


def wide_and_narrow() -> Tensor:
    """[2, 5, 6]: three channels of spread 1, two of spread 50."""
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    x[:, 3:] *= 50
    return x


@pytest.mark.parametrize("child", [MinMaxObserver, MSEObserver])
@pytest.mark.parametrize("axis", [1, -1])
def test_each_part_gets_the_grid_of_an_observer_of_its_own(child: type[MinMaxObserver], axis: int) -> None:
    x = wide_and_narrow() if axis == 1 else wide_and_narrow().transpose(1, 2)
    split = SplitObserver(activation_spec(8), sections=(3, 2), channel_axis=axis, child=child)
    split.observe(x)
    for part, grid in zip(x.split([3, 2], dim=axis), split.part_qparams(), strict=True):
        alone = child(activation_spec(8))
        alone.observe(part)
        assert torch.equal(grid.scale, alone.qparams().scale)
    scale, zero_point = split.qparams()
    assert scale.shape == zero_point.shape == (5,)
    assert scale.unique_consecutive().numel() == 2


def test_splitting_a_wide_and_a_narrow_part_rounds_the_narrow_one_finer() -> None:
    x, spec = wide_and_narrow(), activation_spec(8)
    split, joint = SplitObserver(spec, sections=(3, 2), child=MinMaxObserver), MinMaxObserver(spec)
    split.observe(x)
    joint.observe(x)
    fine = fake_quantize(x, *(along_axis(part, 3, axis=1) for part in split.qparams()), spec)
    coarse = fake_quantize(x, *joint.qparams(), spec)
    assert (fine - x)[:, :3].square().mean() < (coarse - x)[:, :3].square().mean() / 100


def test_ranges_of_the_parts_are_reported() -> None:
    split = SplitObserver(activation_spec(8), sections=(1, 2))
    split.observe(torch.tensor([[[0.0, 2.0], [-8.0, 1.0], [3.0, 4.0]]]))
    assert split.section_ranges() == [(0, 1, 0.0, 2.0), (1, 3, -8.0, 4.0)]
    assert split.range_ratio() == 6.0


def test_a_part_of_zeros_has_an_infinite_ratio() -> None:
    split = SplitObserver(activation_spec(8), sections=(1, 1))
    split.observe(torch.tensor([[0.0, 1.0]]))
    assert split.range_ratio() == float("inf")


def test_other_channels_than_the_sections_are_refused() -> None:
    split = SplitObserver(activation_spec(8), sections=(3, 2))
    split.name = "up.skip"
    with pytest.raises(InputError, match=r"up.skip: shape \(2, 4, 6\), want 5 channels on axis 1"):
        split.observe(torch.zeros(2, 4, 6))
    with pytest.raises(InputError, match=r"up.skip: shape \(5,\)"):
        split.observe(torch.zeros(5))
    assert not split.observed


def test_nan_names_the_layer() -> None:
    split = SplitObserver(activation_spec(8), sections=(1, 1))
    split.name = "up.skip"
    with pytest.raises(NonFiniteError, match=r"up.skip: NaN"):
        split.observe(torch.tensor([[0.0, float("nan")]]))


def test_sections_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="channel counts of 1 or more"):
        SplitObserver(activation_spec(8), sections=(3, 0))
    with pytest.raises(ConfigError, match="want a per-tensor spec"):
        SplitObserver(weight_spec(8), sections=(3, 2))


def test_state_of_the_parts_survives_a_round_trip() -> None:
    split = SplitObserver(activation_spec(8), sections=(3, 2))
    split.observe(wide_and_narrow())
    restored = SplitObserver(activation_spec(8), sections=(3, 2))
    restored.load_state_dict(split.state_dict())
    assert torch.equal(restored.qparams().scale, split.qparams().scale)
