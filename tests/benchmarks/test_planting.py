"""What the outlier benchmark plants changes the ranges of a network and nothing that it computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from planting import CONSTANT, CONSTANT_RATIO, PLANTED, plant
from qdiff_fx.assets import load_conditional, load_unconditional

RATIO = 1000.0


@pytest.fixture(scope="module", params=["unconditional", "conditional"])
def network(request: pytest.FixtureRequest) -> tuple[Any, tuple[Any, ...]]:
    """A bundled network and a call of it: the planters know these two."""
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    if request.param == "unconditional":
        return load_unconditional().unet, (noise, torch.tensor([10, 700]))
    pipe = load_conditional()
    return pipe.unet, (noise, torch.tensor([10, 700]), pipe.context[:2].float())


@pytest.mark.parametrize("planted", [*PLANTED, CONSTANT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_planted_network_computes_what_it_did(
    network: tuple[Any, tuple[Any, ...]], planted: str, dtype: torch.dtype
) -> None:
    """To 1e-4: in float32 sums have terms a thousand times apart, and the eps of a GroupNorm weighs less, 1e-5 of a
    variance of about 1, once its group is larger. Elsewhere float64 shows nothing but the algebra."""
    original, call = network
    original, call = original.to(dtype), tuple(item.to(dtype) for item in call)
    unet = copy.deepcopy(original)
    plant(unet, planted, CONSTANT_RATIO if planted == CONSTANT else RATIO, call, {})
    changed = any(
        not torch.equal(before, after) for before, after in zip(original.parameters(), unet.parameters(), strict=True)
    )
    assert changed == (planted != "GEGLU" or hasattr(original.config, "cross_attention_dim"))
    with torch.no_grad():
        wanted, seen = original(*call).sample, unet(*call).sample
    bound = 1e-4 if dtype == torch.float32 or planted == "residual stream" else 1e-9
    assert (seen - wanted).norm() <= bound * wanted.norm()
