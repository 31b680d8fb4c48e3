"""A LoRA is refused until it is fused into the weights; what was fused is what is quantized."""

from __future__ import annotations

import pytest
import torch

import qdiff_fx
from adapters import with_lora
from families import FAST, SMALL, shortcuts
from qdiff_fx.errors import InputError


def test_a_lora_is_refused_until_it_is_fused() -> None:
    torch.manual_seed(0)
    config = {key: value for key, value in SMALL["controlled"].build().config.items() if not key.startswith("_")}
    unet = with_lora(**config).eval()
    call = (torch.randn(2, 4, 8, 8), torch.tensor([5.0, 5.0]))
    kwargs = {"encoder_hidden_states": torch.randn(2, 7, unet.config.cross_attention_dim)}
    with torch.no_grad():
        wanted = unet(*call, **kwargs).sample
        unet.disable_adapters()
        plain = unet(*call, **kwargs).sample
        unet.enable_adapters()
    assert not torch.allclose(plain, wanted, atol=1e-3)
    with pytest.raises(InputError, match=r"to_q carries an adapter that is not fused .* call pipe.fuse_lora\(\)"):
        qdiff_fx.prepare(unet, FAST, example_inputs=call, example_kwargs=kwargs)
    unet.fuse_lora()
    prepared = qdiff_fx.prepare(unet.eval(), FAST, example_inputs=call, example_kwargs=kwargs)
    with torch.no_grad():
        torch.testing.assert_close(prepared(*call, **kwargs).sample, wanted, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in prepared.graph_module.named_parameters())
    assert shortcuts(prepared.graph_module) == SMALL["lora"].shortcuts
