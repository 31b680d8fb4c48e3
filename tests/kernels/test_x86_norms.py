"""Group normalisation channel by channel against the textbook's, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from qdiff_fx.kernels.x86_norms import group_norm, group_norm_by_channel

EPS = 1e-5


def textbook(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    batch, channels = x.shape[:2]
    wide = x.double().reshape(batch, groups, channels // groups * math.prod(x.shape[2:]))
    center = wide.mean(-1, keepdim=True)
    variance = (wide - center).square().mean(-1, keepdim=True)
    exact = ((wide - center) / (variance + EPS).sqrt()).reshape(x.shape)
    shape = (-1, *(1 for _ in x.shape[2:]))
    if weight is not None:
        exact = exact * weight.double().reshape(shape)
    return exact if bias is None else exact + bias.double().reshape(shape)


@given(
    batch=st.integers(0, 3),
    groups=st.integers(1, 4),
    width=st.integers(1, 5),
    space=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    mean=st.sampled_from([0.0, -3.0, 300.0]),
    spread=st.sampled_from([1.0, 0.1, 50.0]),
    affine=st.sampled_from([(False, False), (True, False), (True, True)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
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
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    channels = groups * width
    x = (torch.randn(batch, channels, *space, generator=generator) * spread + mean).to(dtype)
    weight, bias = (torch.randn(channels, generator=generator).to(dtype) if given else None for given in affine)
    flat = x.double().reshape(batch, groups, width * math.prod(space))
    deviation = (flat - flat.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    assume(bool((deviation > 0.1 * spread).all()))  # of a group that hardly varies nothing but its last bits is seen
    seen, exact = group_norm_by_channel(x, groups, weight, bias, EPS), textbook(x, groups, weight, bias)
    assert seen.dtype == dtype and seen.shape == exact.shape
    bits = max(torch.finfo(dtype).eps, 1e-12)
    # A last bit of the values, in deviations; results are a few deviations, times weights of a few.
    largest = float(flat.abs().amax() / deviation.min()) if batch else 0.0
    tolerance = 32 * min(bits, torch.finfo(torch.float32).eps) * (1 + largest)
    assert torch.allclose(seen.double(), exact, rtol=bits, atol=tolerance)
    assert not batch or tolerance < 0.1 * float(exact.abs().max())


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((2, 6, 5), torch.contiguous_format),
        ((2, 6, 5, 7), torch.contiguous_format),
        ((2, 6, 5, 7), torch.channels_last),
    ],
)
def test_compiled_it_is_the_same_function(shape: tuple[int, ...], memory_format: Any) -> None:
    torch._dynamo.reset()
    x = (torch.randn(*shape) + 3.0).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(6), torch.randn(6)
    seen = torch.compile(group_norm, fullgraph=True)(x, 3, weight, bias, EPS)
    assert torch.allclose(seen.double(), textbook(x, 3, weight, bias), rtol=0, atol=1e-5)


def test_a_large_mean_costs_the_variance_no_digits() -> None:
    """The sum of squares would lose them: 1e4 squared is 2^26.6, a variance of 1 is below its last bit."""
    x = torch.randn(1, 4, 64, 64, dtype=torch.float64)
    far = (x * torch.tensor([1.0, 0.5, 2.0, 1.0]).reshape(1, 4, 1, 1) + 2.0**13).float()
    seen = group_norm_by_channel(far, 2, None, None, EPS)
    assert torch.allclose(seen.double(), textbook(far, 2, None, None), rtol=0, atol=1e-3)
    naive = far.square().mean((2, 3)) - far.mean((2, 3)).square()
    assert ((naive - far.double().var((2, 3), unbiased=False)).abs() > 0.1).any()


def test_a_silent_group_stays_finite() -> None:
    x = torch.cat([torch.full((1, 2, 3, 3), 7.0), torch.randn(1, 2, 3, 3)], dim=1)
    seen = group_norm_by_channel(x, 2, None, torch.arange(4.0), EPS)
    assert torch.equal(seen[0, :2], torch.tensor([0.0, 1.0]).reshape(2, 1, 1).expand(2, 3, 3))


def test_outside_of_compilers_it_is_torchs_own_kernel() -> None:
    x, weight, bias = torch.randn(2, 6, 4, 4), torch.randn(6), torch.randn(6)
    assert torch.equal(group_norm(x, 3, weight, bias, 1e-6), torch.nn.functional.group_norm(x, 3, weight, bias, 1e-6))
