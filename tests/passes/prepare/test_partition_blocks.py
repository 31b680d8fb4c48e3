"""Residual blocks and single layers: every quantized layer in exactly one block, in execution order, by structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qdiff_fx
from foreign.ddpm_style import DdpmUNet
from foreign.guided_style import GuidedUNet
from pass_checks import run_pass
from qdiff_fx.fake_quantize import ActivationQuantizer, WeightQuantizer
from qdiff_fx.graph.meta import ATTENTION, BLOCK, LAYER
from qdiff_fx.passes.prepare.annotate import AnnotatePolicies
from qdiff_fx.passes.prepare.partition_blocks import PartitionBlocks
from subjects import CONTEXT, Preparer, conditional_unet, sketch_inputs


def _blocks(graph: fx.Graph) -> list[list[str]]:
    """Names of the layers and attentions of each block, blocks by number."""
    members: dict[int, list[str]] = {}
    for node in graph.nodes:
        policy, number = LAYER.get(node) or ATTENTION.get(node), BLOCK.get(node)
        if policy is not None and number is not None:
            members.setdefault(number, []).append(policy.name)
    assert sorted(members) == list(range(len(members))), "every block has a layer, numbers are dense"
    return [members[number] for number in sorted(members)]


def _assert_partition(prepared: qdiff_fx.PreparedUNet) -> None:
    """Every quantized layer is in a block, and values leave a block at one node only."""
    nodes = list(prepared.graph_module.graph.nodes)
    for node in nodes:
        policy = LAYER.get(node)
        assert policy is None or policy.weight is None or BLOCK.get(node) is not None, node.name
    exits: dict[int, set[fx.Node]] = {}
    for node in nodes:
        number = BLOCK.get(node)
        if number is not None and not _is_quantizer(prepared, node):
            readers = [
                reader for user in node.users for reader in (user.users if _is_quantizer(prepared, user) else [user])
            ]
            if any(BLOCK.get(reader) != number for reader in readers):
                exits.setdefault(number, set()).add(node)
    assert {number: len(found) for number, found in exits.items()} == dict.fromkeys(exits, 1)


def _is_quantizer(prepared: qdiff_fx.PreparedUNet, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return isinstance(prepared.graph_module.get_submodule(str(node.target)), (ActivationQuantizer, WeightQuantizer))


RESNET = ("conv1", "time_emb_proj", "conv2")


def _resnet(path: str, shortcut: tuple[str, ...] = ()) -> list[str]:
    return [f"{path}.{name}" for name in (*RESNET, *shortcut)]


def _attention(path: str) -> list[str]:
    return [f"{path}.to_q", f"{path}.to_k", f"{path}.to_v", path, f"{path}.to_out.0"]


SPLIT = ("conv_shortcut#0", "conv_shortcut#1")


def test_blocks_of_an_unconditional_unet(preparer: Preparer, unconditional: nn.Module) -> None:
    prepared = preparer(unconditional)
    assert _blocks(prepared.graph_module.graph) == [
        ["time_embedding.linear_1"],
        ["time_embedding.linear_2"],
        ["conv_in"],
        _resnet("down_blocks.0.resnets.0"),
        ["down_blocks.0.downsamplers.0.conv"],
        _resnet("down_blocks.1.resnets.0", ("conv_shortcut",)),
        _attention("down_blocks.1.attentions.0"),
        _resnet("mid_block.resnets.0"),
        _attention("mid_block.attentions.0"),
        _resnet("mid_block.resnets.1"),
        _resnet("up_blocks.0.resnets.0", SPLIT),
        _attention("up_blocks.0.attentions.0"),
        _resnet("up_blocks.0.resnets.1", SPLIT),
        _attention("up_blocks.0.attentions.1"),
        ["up_blocks.0.upsamplers.0.conv"],
        _resnet("up_blocks.1.resnets.0", SPLIT),
        _resnet("up_blocks.1.resnets.1", SPLIT),
        ["conv_out"],
    ]
    _assert_partition(prepared)


def _transformer(path: str, layers: int = 1) -> list[str]:
    inner = []
    for index in range(layers):
        block = f"{path}.transformer_blocks.{index}"
        inner += [
            *_attention(f"{block}.attn1"),
            *_attention(f"{block}.attn2"),
            f"{block}.ff.net.0.proj",
            f"{block}.ff.net.2",
        ]
    return [f"{path}.proj_in", *inner, f"{path}.proj_out"]


def test_a_transformer_with_one_layer_is_one_block_with_the_contexts_keys_inside(
    preparer: Preparer, conditional: nn.Module
) -> None:
    prepared = preparer(conditional)
    blocks = _blocks(prepared.graph_module.graph)
    assert _transformer("down_blocks.0.attentions.0") in blocks
    assert _transformer("mid_block.attentions.0") in blocks
    assert _resnet("mid_block.resnets.0") in blocks
    assert len(blocks) == 18
    _assert_partition(prepared)


def test_a_stage_with_several_transformer_layers_is_taken_apart() -> None:
    torch.manual_seed(0)
    unet = conditional_unet(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        transformer_layers_per_block=3,
        use_linear_projection=True,
    )
    prepared = qdiff_fx.prepare(unet)
    blocks = _blocks(prepared.graph_module.graph)
    stage = "mid_block.attentions.0"
    inside = [block for block in blocks if any(name.startswith(stage) for name in block)]
    assert len(inside) >= 3, "one reconstruction block for three layers would be too much"
    layers = [_transformer(stage, 3)[1 + 12 * index : 1 + 12 * (index + 1)] for index in range(3)]
    for block in inside:
        owners = [index for index, layer in enumerate(layers) if set(block) & set(layer)]
        assert len(owners) <= 1, f"{block} mixes layers {owners}"
    assert sorted(name for block in inside for name in block) == sorted(_transformer(stage, 3))
    _assert_partition(prepared)


@pytest.mark.parametrize(("kind", "singles"), [(DdpmUNet, 6), (GuidedUNet, 5)])
def test_foreign_unets_fall_into_residual_blocks(kind: type[nn.Module], singles: int, foreign: Any) -> None:
    prepared = foreign(kind).prepared
    sizes = [len(block) for block in _blocks(prepared.graph_module.graph)]
    assert len(sizes) == 16 and sizes.count(1) == singles
    _assert_partition(prepared)


class Renamed(nn.Module):
    """The same network under other names."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.x = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.x(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def test_names_play_no_role(preparer: Preparer, conditional: nn.Module) -> None:
    call = (torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, 7, CONTEXT))
    renamed = qdiff_fx.prepare(Renamed(conditional).eval(), example_inputs=call)

    def shape(prepared: qdiff_fx.PreparedUNet) -> list[tuple[str, Any]]:
        return [(str(node.target), BLOCK.get(node)) for node in prepared.graph_module.graph.nodes if LAYER.get(node)]

    assert shape(renamed) == shape(preparer(conditional))
    names = {policy.name for node in renamed.graph_module.graph.nodes if (policy := LAYER.get(node))}
    assert all(name.startswith("x.") for name in names)


class Residuals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
        self.embed = nn.Linear(1, 2)

    def forward(self, sample: Tensor, timestep: Tensor, control: Tensor) -> Tensor:
        h = self.stem(sample)
        h = h + self.embed(timestep[:, None])[:, :, None, None]  # broadcast: no residual
        h = h + control  # an input: no residual
        return h + self.b(self.a(h).relu())  # a residual


def test_broadcast_adds_and_adds_of_inputs_are_no_residuals() -> None:
    inputs = (torch.randn(2, 2, 4, 4), torch.rand(2), torch.randn(2, 2, 4, 4))
    run = run_pass(PartitionBlocks(), Residuals(), inputs, before=(AnnotatePolicies(),))
    assert _blocks(run.graph_module.graph) == [["stem"], ["embed"], ["a", "b"]]


def test_a_value_that_is_read_outside_stays_outside() -> None:
    class Leaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.c = (nn.Conv2d(2, 2, 1) for _ in range(4))

        def forward(self, sample: Tensor) -> Tensor:
            h = self.stem(sample)
            inner = self.a(h)
            return (h + self.b(inner)) * self.c(inner)

    run = run_pass(PartitionBlocks(), Leaking(), (torch.randn(2, 2, 4, 4),), before=(AnnotatePolicies(),))
    assert _blocks(run.graph_module.graph) == [["stem"], ["a"], ["b"], ["c"]]


def test_the_adds_of_a_split_are_no_residuals(preparer: Preparer, sketch: nn.Module) -> None:
    blocks = _blocks(preparer(sketch, example_inputs=sketch_inputs()).graph_module.graph)
    assert ["skip#0"] in blocks and ["skip#1"] in blocks
