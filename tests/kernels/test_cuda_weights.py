"""Weights and corrections for the cuda kernels, against what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from qdiff_fx.kernels import reference
from qdiff_fx.kernels.cuda_weights import (
    correction_table,
    kernel_packed_weight,
    kernel_shifts,
    kernel_weight,
)
from qdiff_fx.numerics.packing import pack_int4, pack_shifts


def test_an_int8_weight_has_its_channels_last() -> None:
    weight = torch.randint(-127, 128, (3, 5, 2, 4), dtype=torch.int8)
    assert torch.equal(kernel_weight(weight).view(3, 2, 4, 5), weight.permute(0, 2, 3, 1))


def test_a_pointwise_weight_is_not_copied() -> None:
    for shape in ((3, 5), (3, 5, 1, 1)):
        weight = torch.zeros(shape, dtype=torch.int8)
        assert kernel_weight(weight).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("channels", [6, 7, 1])
def test_packed_halves_of_a_tap_lie_in_one_byte(channels: int) -> None:
    codes = torch.randint(0, 16, (3, channels, 2, 2), dtype=torch.uint8)
    zero_point = torch.randint(0, 16, (3,), dtype=torch.uint8)
    half = -(-channels // 2)
    packed = kernel_packed_weight(pack_int4(codes), zero_point, codes.shape).view(torch.uint8).view(3, 4, half)
    unpacked = torch.cat([packed & 15, packed >> 4], dim=2)
    assert torch.equal(unpacked[:, :, :channels], codes.flatten(2).transpose(1, 2))
    # A missing channel stands for weight 0.
    assert torch.equal(unpacked[:, :, channels:], zero_point.view(3, 1, 1).expand(3, 4, 2 * half - channels))


def test_shifts_of_a_group_follow_its_channels() -> None:
    shifts = torch.tensor([0, 1, 2, 3, 1, 2])
    assert kernel_shifts(pack_shifts(shifts), 6, 2).tolist() == [0, 1, 2, 0, 3, 1, 2, 0]


def test_a_correction_is_what_the_zero_point_adds_at_every_pixel() -> None:
    weight = torch.randint(-127, 128, (3, 4, 3, 2), dtype=torch.int8)
    padding, dilation = (2, 1), (1, 1)
    table = correction_table(weight, -50, padding, dilation).view(3, 3, 2, 2, 3)
    ones = torch.ones(1, 4, 5, 6, dtype=torch.float64)
    seen = functional.conv2d(ones, weight.double(), padding=padding)[0] * -50
    # Interior, one and two taps cut off above, one behind at the right.
    assert torch.equal(table[0, 0, 0, 0].double(), seen[:, 3, 2])
    assert torch.equal(table[2, 0, 0, 0].double(), seen[:, 0, 2])
    assert torch.equal(table[1, 0, 0, 1].double(), seen[:, 1, 6])


def test_without_padding_a_correction_is_a_sum() -> None:
    weight = torch.randint(-127, 128, (3, 7), dtype=torch.int8)
    accumulator = reference.linear_accumulator(torch.full((1, 7), 9, dtype=torch.uint8), 0, weight)
    assert torch.equal(correction_table(weight, 9), accumulator)
