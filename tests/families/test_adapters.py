"""An IP-Adapter is captured with the network it is part of; a LoRA is refused until it is fused into the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

import qdiff_fx
from families import FAST, SMALL, attentions, shortcuts
from qdiff_fx.errors import InputError
from subjects import signal_to_noise

TOKENS, PICTURE, CONTEXT = 4, 12, 8


def _adapted() -> UNet2DConditionModel:
    """A one-level UNet with a random IP-Adapter, loaded as diffusers loads one."""
    torch.manual_seed(0)
    unet: UNet2DConditionModel = SMALL["controlled"].build().eval()  # type: ignore[assignment]
    crossed = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    keys = {f"{2 * index + 1}.to_{kind}_ip.weight" for index in range(len(crossed)) for kind in "kv"}
    projection = {
        "proj.weight": torch.randn(TOKENS * CONTEXT, PICTURE) * 0.1,
        "proj.bias": torch.zeros(TOKENS * CONTEXT),
        "norm.weight": torch.ones(CONTEXT),
        "norm.bias": torch.zeros(CONTEXT),
    }
    adapter = {key: torch.randn(8, CONTEXT) * 0.1 for key in sorted(keys)}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": adapter}])
    return unet.eval()


@pytest.mark.slow
def test_an_ip_adapter_is_quantized_with_the_network(tmp_path: Path) -> None:
    unet, call = _adapted(), (torch.randn(2, 4, 8, 8), torch.tensor([5.0, 5.0]))
    kwargs = {
        "encoder_hidden_states": torch.randn(2, 7, CONTEXT),
        "added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, PICTURE)]},
    }
    prepared = qdiff_fx.prepare(unet, FAST, example_inputs=call, example_kwargs=kwargs)
    plain = SMALL["controlled"]
    assert attentions(prepared.graph_module) == plain.attentions + 4  # the picture's, beside each cross-attention
    assert shortcuts(prepared.graph_module) == plain.shortcuts
    with torch.no_grad():
        wanted = unet(*call, **kwargs).sample
        torch.testing.assert_close(prepared(*call, **kwargs).sample, wanted, rtol=1e-4, atol=1e-5)
        qdiff_fx.save(qdiff_fx.convert(prepared, backend="reference"), tmp_path)
        loaded = qdiff_fx.load(tmp_path, backend="reference")
        assert signal_to_noise(wanted, loaded(*call, **kwargs).sample) > 8
    with pytest.raises(InputError, match=r"added_cond_kwargs is not given, .* prepare the model again"):
        loaded(*call, encoder_hidden_states=kwargs["encoder_hidden_states"])


def test_a_lora_is_refused_until_it_is_fused() -> None:
    torch.manual_seed(0)
    unet: UNet2DConditionModel = SMALL["controlled"].build().eval()  # type: ignore[assignment]
    call = (torch.randn(2, 4, 8, 8), torch.tensor([5.0, 5.0]))
    kwargs = {"encoder_hidden_states": torch.randn(2, 7, CONTEXT)}
    with torch.no_grad():
        plain = unet(*call, **kwargs).sample
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
        wanted = unet(*call, **kwargs).sample
    assert not torch.allclose(plain, wanted, atol=1e-3)
    with pytest.raises(InputError, match=r"to_q carries an adapter that is not fused .* call pipe.fuse_lora\(\)"):
        qdiff_fx.prepare(unet, FAST, example_inputs=call, example_kwargs=kwargs)
    unet.fuse_lora()
    prepared = qdiff_fx.prepare(unet.eval(), FAST, example_inputs=call, example_kwargs=kwargs)
    with torch.no_grad():
        torch.testing.assert_close(prepared(*call, **kwargs).sample, wanted, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in prepared.graph_module.named_parameters())
    assert shortcuts(prepared.graph_module) == SMALL["controlled"].shortcuts
