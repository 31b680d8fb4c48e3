"""Eval mode for a measurement, and the tensor of any output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from qdiff_fx.errors import InputError
from qdiff_fx.evaluation.inference import evaluating, output_tensor


def check_and_stop(network: nn.Module) -> None:
    with evaluating(network, torch.sin):
        assert not any(module.training for module in network.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("stop")


def test_training_flags_are_off_inside_and_as_before_after_an_error() -> None:
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    network[1].eval()
    with pytest.raises(RuntimeError, match="stop"):
        check_and_stop(network)
    assert [module.training for module in network.modules()] == [True, True, False]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, None),
        lambda x: [x],
        lambda x: UNet2DOutput(sample=x),
        lambda x: SimpleNamespace(sample=x),
    ],
    ids=["tensor", "tuple", "list", "diffusers", "namespace"],
)
def test_every_form_of_output_gives_its_tensor(wrap: Any) -> None:
    tensor = torch.ones(2)
    assert output_tensor(wrap(tensor)) is tensor


def test_several_results_stand_side_by_side() -> None:
    maps, middle = [torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)], torch.full((2, 5), 2.0)
    joined = output_tensor((maps, middle))
    assert joined.shape == (2, 48 + 12 + 5) and joined.sum() == 2 * (48 + 10)
    output = ControlNetOutput(down_block_res_samples=tuple(maps), mid_block_res_sample=middle)
    assert torch.equal(output_tensor(output), joined)


@pytest.mark.parametrize("output", [None, (), {"a": torch.ones(1)}, ("no",)], ids=["none", "empty", "dict", "text"])
def test_an_output_without_a_tensor_is_refused(output: Any) -> None:
    with pytest.raises(InputError, match="want a tensor"):
        output_tensor(output)
