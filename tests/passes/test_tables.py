"""The PREPARE table as a whole: repeatable, tagged, and in its order."""

from __future__ import annotations

import warnings

import pytest
from torch import fx, nn

from pass_checks import snapshot
from qdiff_fx.config import QDiffConfig
from qdiff_fx.fake_quantize import ActivationQuantizer, WeightQuantizer
from qdiff_fx.graph.edit import layer_call, shared_copy
from qdiff_fx.graph.meta import BLOCK, LAYER, MODULE_PATH
from qdiff_fx.passes.base import GraphPass, PassContext, PassResult, run_passes
from qdiff_fx.passes.prepare import PREPARE
from subjects import Preparer, sketch_inputs


def _graph(preparer: Preparer, sketch: nn.Module) -> tuple[fx.GraphModule, PassContext]:
    captured = preparer.capture(sketch, sketch_inputs(), None)
    context = PassContext(config=QDiffConfig(), signature=captured.signature)
    return shared_copy(captured.graph_module), context


def test_every_pass_of_the_table_is_honest_and_repeats_without_change(preparer: Preparer, sketch: nn.Module) -> None:
    graph_module, context = _graph(preparer, sketch)
    for prepare_pass in PREPARE:
        before = snapshot(graph_module)
        result = prepare_pass.run(graph_module, context)
        after = snapshot(graph_module)
        assert result.modified == (before != after), result.name
        assert not prepare_pass.run(graph_module, context).modified and snapshot(graph_module) == after, result.name


def test_running_the_table_again_inserts_nothing_twice(preparer: Preparer, sketch: nn.Module) -> None:
    graph_module, context = _graph(preparer, sketch)
    run_passes(PREPARE, graph_module, context)
    modules = sorted(name for name, _ in graph_module.named_modules())
    run_passes(PREPARE, graph_module, context)
    assert sorted(name for name, _ in graph_module.named_modules()) == modules


def test_results_name_their_passes_in_order(preparer: Preparer, sketch: nn.Module) -> None:
    prepared = preparer(sketch, example_inputs=sketch_inputs())
    assert [result.name for result in prepared.pass_results] == [type(item).__name__ for item in PREPARE]


def test_every_layer_of_the_graph_is_tagged_quantized_and_in_a_block(
    preparer: Preparer, unconditional: nn.Module
) -> None:
    prepared = preparer(unconditional)
    modules = dict(prepared.graph_module.named_modules())
    layers = [node for node in prepared.graph_module.graph.nodes if layer_call(node)]
    assert len(layers) > 50
    for node in layers:
        policy, layer = LAYER.require(node), layer_call(node)
        assert layer is not None and MODULE_PATH.get(node) and BLOCK.get(node) is not None
        assert isinstance(modules[str(layer.weight.target)], WeightQuantizer)
        observed = layer.input.op == "call_module" and isinstance(modules[str(layer.input.target)], ActivationQuantizer)
        assert observed == (policy.activation is not None), policy.name


def test_passes_run_in_the_given_order(preparer: Preparer, sketch: nn.Module) -> None:
    order: list[str] = []

    class Note(GraphPass):
        def __init__(self, text: str) -> None:
            self.text = text

        def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
            order.append(self.text)
            return PassResult(name=self.name, modified=False)

    results = run_passes((Note("a"), Note("b")), *_graph(preparer, sketch))
    assert order == ["a", "b"] and [result.name for result in results] == ["Note", "Note"]


@pytest.mark.parametrize("name", ["unconditional", "conditional", "sketch"])
def test_preparing_warns_of_nothing(preparer: Preparer, name: str, request: pytest.FixtureRequest) -> None:
    call = {"example_inputs": sketch_inputs()} if name == "sketch" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preparer(request.getfixturevalue(name), **call)
