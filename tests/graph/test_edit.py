"""Edits keep provenance and tensors; ancestors follow activations only."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from qdiff_fx.graph.edit import (
    add_module,
    ancestors,
    create_call,
    freeze_parameters,
    get_tensor,
    layer_call,
    pruned,
    set_tensor,
    shared_copy,
    stored_bytes,
)
from qdiff_fx.graph.meta import BLOCK, MODULE_PATH
from subjects import Preparer, sketch_inputs

aten = torch.ops.aten


def _sketch_graph(preparer: Preparer, sketch: nn.Module) -> fx.GraphModule:
    return preparer.capture(sketch, sketch_inputs(), None).graph_module


def test_layer_calls_are_read_by_argument_name(preparer: Preparer, sketch: nn.Module) -> None:
    graph_module = _sketch_graph(preparer, sketch)
    layers = {MODULE_PATH.get(node): layer_call(node) for node in graph_module.graph.nodes if layer_call(node)}
    wide, project, qkv = layers["wide"], layers["project"], layers["qkv"]
    assert wide is not None and project is not None and qkv is not None
    assert (wide.operator, wide.padding, wide.dilation, wide.groups) == ("conv2d", [2, 2], [2, 2], 2)
    assert project.operator == "linear" and project.bias is None and project.channel_axis == -1
    assert qkv.operator == "conv1d" and qkv.channel_axis == 1


def test_a_new_call_carries_where_it_came_from_and_a_fake_value(preparer: Preparer, sketch: nn.Module) -> None:
    graph = _sketch_graph(preparer, sketch).graph
    layer = next(node for node in graph.nodes if node.target is aten.conv2d.default)
    BLOCK.set(layer, 3)
    with graph.inserting_after(layer):
        call = create_call(graph, aten.mul.Tensor, (layer, 2.0), like=layer)
    assert MODULE_PATH.get(call) == MODULE_PATH.get(layer) == "stem" and BLOCK.get(call) == 3
    assert call.meta["val"].shape == layer.meta["val"].shape


def test_a_shared_copy_has_its_own_graph_and_the_same_tensors(preparer: Preparer, sketch: nn.Module) -> None:
    original = _sketch_graph(preparer, sketch)
    result = shared_copy(original)
    result.graph.erase_node(result.graph.output_node())
    assert original.graph.output_node()
    assert get_tensor(result, "stem.weight") is get_tensor(original, "stem.weight") is sketch.stem.weight


def test_pruning_drops_exactly_what_no_node_names() -> None:
    root = nn.Module()
    set_tensor(root, "used.weight", nn.Parameter(torch.ones(1)))
    set_tensor(root, "unused.weight", nn.Parameter(torch.ones(1)))
    graph = fx.Graph()
    graph.output(graph.get_attr("used.weight"))
    result = pruned(fx.GraphModule(root, graph))
    assert [name for name, _ in result.named_parameters()] == ["used.weight"]


def test_parameters_stay_parameters_and_tensors_become_buffers() -> None:
    root = nn.Module()
    set_tensor(root, "a.b.weight", nn.Parameter(torch.ones(2)))
    set_tensor(root, "a.b.scale", torch.ones(3))
    assert dict(root.named_parameters()).keys() == {"a.b.weight"} and dict(root.named_buffers()).keys() == {"a.b.scale"}
    set_tensor(root, "a.b.weight", torch.zeros(2))  # replaced, in the other role
    assert not list(root.parameters()) and get_tensor(root, "a.b.weight").sum() == 0


def test_module_names_are_made_unique() -> None:
    graph_module = fx.GraphModule(nn.Module(), fx.Graph())
    assert [add_module(graph_module, "q", nn.Identity()) for _ in range(3)] == ["q", "q_1", "q_2"]


def test_two_tensors_are_not_related_by_a_weight_or_a_size() -> None:
    graph = fx.Graph()
    left, right = graph.placeholder("left"), graph.placeholder("right")
    weight = graph.get_attr("weight")
    outputs = [graph.call_function(aten.matmul.default, (item, weight)) for item in (left, right)]
    for node in (left, right, weight, *outputs):
        node.meta["val"] = torch.empty(2, 2)
    masks = ancestors(graph)
    assert masks[outputs[0]] & masks[outputs[1]] == 0
    assert masks[outputs[0]] & masks[left] == masks[left]


def test_stored_bytes_count_elements_by_their_size() -> None:
    assert stored_bytes([torch.zeros(3, dtype=torch.uint8), torch.zeros(2, 2)]) == 3 + 16


def test_metadata_survives_a_deepcopy_of_the_graph(preparer: Preparer, sketch: nn.Module) -> None:
    graph = _sketch_graph(preparer, sketch).graph
    paths = [MODULE_PATH.get(node) for node in graph.nodes]
    assert paths == [MODULE_PATH.get(node) for node in copy.deepcopy(graph).nodes]


def test_frozen_parameters_share_storage_and_leave_the_originals_alone() -> None:
    parameter = nn.Parameter(torch.ones(2))
    root = nn.Module()
    set_tensor(root, "a.weight", parameter)
    set_tensor(root, "b.weight", parameter)
    graph = fx.Graph()
    graph.output((graph.get_attr("a.weight"), graph.get_attr("b.weight")))
    graph_module = fx.GraphModule(root, graph)
    freeze_parameters(graph_module)
    frozen = list(graph_module.named_parameters(remove_duplicate=False))
    assert [name for name, _ in frozen] == ["a.weight", "b.weight"] and parameter.requires_grad
    assert all(not item.requires_grad and item.data_ptr() == parameter.data_ptr() for _, item in frozen)
