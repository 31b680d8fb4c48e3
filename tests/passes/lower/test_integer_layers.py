"""Large 4-bit weights are unpacked a few rows at a time, to the same integers."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from qdiff_fx.kernels.reference import integer_weight
from qdiff_fx.numerics.packing import pack_int4, pack_shifts
from qdiff_fx.passes.lower import integer_layers
from qdiff_fx.passes.lower.integer_layers import folded_weight


@pytest.mark.parametrize("shape", [[7, 5, 3, 3], [8, 6], [1, 3], [5, 1], [6, 4, 1, 1]], ids=str)
@pytest.mark.parametrize("elements", [1, 40, 100])
@pytest.mark.parametrize("shifted", [False, True])
def test_rows_at_a_time_give_the_same_integers(shape: list[int], elements: int, shifted: bool) -> None:
    packed = pack_int4(torch.randint(0, 16, shape, dtype=torch.uint8))
    zero_point = torch.randint(0, 16, (shape[0],), dtype=torch.uint8)
    shift = pack_shifts(torch.randint(0, 4, (shape[1],), dtype=torch.uint8)) if shifted else None
    wanted = integer_weight(packed, zero_point, shift, shape, 1)
    with patch.object(integer_layers, "CODES_AT_A_TIME", elements):
        assert torch.equal(folded_weight(packed, zero_point, shift, shape, 1), wanted)
