"""Passes look at structure: a UNet whose modules and classes all have other names gets the same result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qdiff_fx
from families import FAST, SMALL
from foreign.ddpm_style import DdpmUNet
from foreign.guided_style import GuidedUNet
from qdiff_fx.examples import example_call
from qdiff_fx.graph.meta import ATTENTION, BLOCK, LAYER, SPLIT_ADD, SPLIT_PART

Decisions = list[tuple[Any, ...]]


def _renamed(unet: nn.Module) -> nn.Module:
    """A copy whose every module has another name and a class of another name, with the same forward."""
    renamed = copy.deepcopy(unet)
    for index, module in enumerate(list(renamed.modules())):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            continue  # their names are numbers and keys
        old = dict(module._modules)
        names = {name: f"part{index}_{position}" for position, name in enumerate(old)}
        module._modules.clear()
        module._modules.update({names[name]: child for name, child in old.items()})

        module.__class__ = type(f"Kind{index}", (type(module),), {"__getattr__": _finder(type(module), names)})
    return renamed


def _finder(kind: Any, names: dict[str, str]) -> Callable[[nn.Module, str], Any]:
    """__getattr__ of a class that finds a child under its old name."""
    return lambda module, name: kind.__getattr__(module, names.get(name, name))


def _decisions(prepared: qdiff_fx.PreparedUNet) -> Decisions:
    """What the passes decided for every node, without the names that it was given for people."""
    rows: Decisions = []
    for node in prepared.graph_module.graph.nodes:
        layer, attention, part = LAYER.get(node), ATTENTION.get(node), SPLIT_PART.get(node)
        rows.append(
            (
                node.op,
                "" if isinstance(node.target, str) else str(node.target),
                layer and (layer.operator, layer.weight, layer.activation, layer.reason),
                attention and (attention.query_key_value, attention.probabilities),
                part and (part.index, part.start, part.stop),
                SPLIT_ADD.get(node),
                BLOCK.get(node),
                len(node.all_input_nodes),
            )
        )
    return rows


@pytest.mark.parametrize(
    "name", [name if name == "sd-2" else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_renaming_every_module_and_class_changes_no_decision(name: str) -> None:
    family = SMALL[name]
    unet = family.build().eval()
    args, kwargs = example_call(unet)
    kwargs |= family.example(unet, (args, kwargs)) if family.example else {}
    _same_decisions(unet, args, kwargs, shortcuts=bool(family.shortcuts))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DdpmUNet, GuidedUNet])
def test_renaming_a_network_without_diffusers_changes_no_decision(kind: type[nn.Module]) -> None:
    net = kind().eval()
    kwargs = {"y": torch.tensor([0, 1])} if kind is GuidedUNet else {}
    _same_decisions(net, (torch.zeros(2, 3, 8, 8), torch.zeros(2)), kwargs, shortcuts=True)


def _same_decisions(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, shortcuts: bool) -> None:
    renamed = _renamed(unet)
    assert not {path for path, _ in unet.named_modules() if path} & {path for path, _ in renamed.named_modules()}
    assert not {type(item).__name__ for item in renamed.modules()} & {"Attention", "ResnetBlock2D", "Conv2d", "Linear"}
    call: dict[str, Any] = {"example_inputs": args, "example_kwargs": kwargs}
    wanted, seen = (_decisions(qdiff_fx.prepare(item, FAST, **call)) for item in (unet, renamed))
    assert any(row[4] for row in seen) == shortcuts and any(row[3] for row in seen) and any(row[2] for row in seen)
    assert seen == wanted
