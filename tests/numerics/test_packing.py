"""Storage of codes and shifts: what goes in comes out, whatever the shape."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from qdiff_fx.errors import QuantSpecError
from qdiff_fx.numerics.packing import pack_int4, pack_shifts, unpack_int4, unpack_shifts

shapes = st.one_of(st.just(()), array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=7))
codes = arrays(np.uint8, shapes, elements=st.integers(0, 15)).map(torch.from_numpy)


@given(codes)
def test_int4_round_trip_on_every_shape(codes: Tensor) -> None:
    packed = pack_int4(codes)
    assert packed.shape == ((codes.numel() + 1) // 2,)
    assert torch.equal(unpack_int4(packed, codes.shape), codes)


@given(arrays(np.uint8, st.integers(0, 40), elements=st.integers(0, 3)).map(torch.from_numpy))
def test_shift_round_trip(shifts: Tensor) -> None:
    packed = pack_shifts(shifts)
    assert packed.shape == ((shifts.numel() + 3) // 4,)
    assert torch.equal(unpack_shifts(packed, shifts.numel()), shifts)


def test_layout_is_low_bits_first() -> None:
    assert pack_int4(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist() == [0x21, 0x0F]
    assert pack_shifts(torch.tensor([1, 2, 3, 0, 2])).tolist() == [0b00_11_10_01, 0b10]


def test_a_transposed_tensor_is_packed_in_its_logical_order() -> None:
    codes = torch.arange(6, dtype=torch.uint8).view(2, 3)
    assert torch.equal(unpack_int4(pack_int4(codes.T), (3, 2)), codes.T)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float32])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(QuantSpecError, match=r"want torch.uint8"):
        pack_int4(torch.zeros(4, dtype=dtype))
    with pytest.raises(QuantSpecError, match=r"want torch.uint8"):
        unpack_int4(torch.zeros(2, dtype=dtype), (4,))


def test_codes_and_shifts_out_of_range_are_refused() -> None:
    with pytest.raises(QuantSpecError, match=r"code 16 does not fit 4 bits"):
        pack_int4(torch.tensor([3, 16], dtype=torch.uint8))
    with pytest.raises(QuantSpecError, match=r"shifts in \[-1, 4\]: want 0..3"):
        pack_shifts(torch.tensor([-1, 4]))


@pytest.mark.parametrize("size", [0, 2, 4])
def test_a_wrong_byte_count_is_refused(size: int) -> None:
    with pytest.raises(QuantSpecError, match=r"want torch.uint8 \[3\] for shape \(5,\)"):
        unpack_int4(torch.zeros(size, dtype=torch.uint8), (5,))
    with pytest.raises(QuantSpecError, match=r"want torch.uint8 \[3\] for shape \(9,\)"):
        unpack_shifts(torch.zeros(size, dtype=torch.uint8), 9)


@pytest.mark.usefixtures("unchecked_shapes")
def test_packing_is_traceable_when_it_does_not_validate() -> None:
    def round_trip(codes: Tensor) -> Tensor:
        return unpack_int4(pack_int4(codes, validate=False), codes.shape)

    codes = torch.arange(15, dtype=torch.uint8).view(3, 5)
    assert torch.equal(torch.compile(round_trip, fullgraph=True, backend="eager")(codes), codes)
