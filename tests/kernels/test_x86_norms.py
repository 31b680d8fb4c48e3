"""Group normalisation channel by channel against the textbook's, in float64."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff_fx.kernels.x86_norms import group_norm, group_norm_by_channel


@given(
    batch=st.integers(0, 3),
    groups=st.integers(1, 4),
    width=st.integers(1, 5),
    space=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    mean=st.sampled_from([0.0, -3.0, 1e3]),
    spread=st.sampled_from([1.0, 1e-3, 50.0]),
    affine=st.sampled_from([(False, False), (True, False), (True, True)]),
    seed=st.integers(0, 2**31),
)
def test_it_is_group_norm(
    batch: int,
    groups: int,
    width: int,
    space: list[int],
    mean: float,
    spread: float,
    affine: tuple[bool, bool],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    channels, eps = groups * width, 1e-5
    x = torch.randn(batch, channels, *space, generator=generator) * spread + mean
    weight, bias = (torch.randn(channels, generator=generator) if given else None for given in affine)
    wide = x.double().reshape(batch, groups, width * math.prod(space))
    center = wide.mean(-1, keepdim=True)
    variance = (wide - center).square().mean(-1, keepdim=True)
    exact = ((wide - center) / (variance + eps).sqrt()).reshape(x.shape)
    shape = (-1, *(1 for _ in space))
    if weight is not None:
        exact = exact * weight.double().reshape(shape)
    if bias is not None:
        exact = exact + bias.double().reshape(shape)
    seen = group_norm_by_channel(x, groups, weight, bias, eps)
    assert seen.dtype == x.dtype and seen.shape == x.shape
    # x * scale + offset cancels the mean, which costs its ratio to the spread in last bits, as in torch's own kernel.
    ratio = 1 + abs(mean) / float((variance + eps).sqrt().min()) if batch else 1.0
    largest = 1 + float(exact.abs().max()) if batch else 1.0
    assert torch.allclose(seen.double(), exact, rtol=0, atol=4e-6 * ratio * largest)


def test_a_large_mean_costs_the_variance_no_digits() -> None:
    """The sum of squares would lose them: 1e4 squared is 2^26.6, a variance of 1 is below its last bit."""
    x = torch.randn(1, 4, 64, 64, dtype=torch.float64)
    far = x * torch.tensor([1.0, 0.5, 2.0, 1.0]).reshape(1, 4, 1, 1) + 2.0**13
    near = group_norm_by_channel((far - 2.0**13).float(), 2, None, None, 1e-5)
    seen = group_norm_by_channel(far.float(), 2, None, None, 1e-5)
    assert abs(seen.std() / near.std() - 1) < 1e-3


def test_a_silent_group_stays_finite() -> None:
    x = torch.cat([torch.full((1, 2, 3, 3), 7.0), torch.randn(1, 2, 3, 3)], dim=1)
    seen = group_norm_by_channel(x, 2, None, torch.arange(4.0), 1e-5)
    # 7 * rsqrt(1e-5) - 7 * rsqrt(1e-5): a last bit of 2,214 may remain.
    assert torch.allclose(seen[0, :2], torch.tensor([0.0, 1.0]).reshape(2, 1, 1).expand(2, 3, 3), atol=1e-3)


def test_outside_of_compilers_it_is_torchs_own_kernel() -> None:
    x, weight, bias = torch.randn(2, 6, 4, 4), torch.randn(6), torch.randn(6)
    assert torch.equal(group_norm(x, 3, weight, bias, 1e-6), torch.nn.functional.group_norm(x, 3, weight, bias, 1e-6))
