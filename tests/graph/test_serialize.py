"""A stored graph comes back equal, and a stored graph that was tampered with never becomes code."""

from __future__ import annotations

import copy
import json
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from qdiff_fx.checkpoint.plan import decode_model
from qdiff_fx.errors import CheckpointError
from qdiff_fx.graph.allowlist import ATEN, QDIFF, resolve_target, target_name
from qdiff_fx.graph.arguments import Tokens, decode_argument, encode_argument
from qdiff_fx.graph.meta import FIXED_DTYPE
from qdiff_fx.graph.record import Record
from qdiff_fx.graph.serialize import decode_graph, encode_graph
from qdiff_fx.safe_io import read_tensors

aten = torch.ops.aten

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"
TOKENS = Tokens(carrier=torch.float32, device=torch.device("cpu"))
CANARY = "QDIFF_FX_TEST_CANARY"
PAYLOAD = f"__import__('os').environ.__setitem__('{CANARY}', 'executed')"


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    """The golden file's plan without what only the file needs."""
    content = json.loads((GOLDEN / "plan.json").read_text())
    return {key: content[key] for key in content if key not in ("shards", "tensors")}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    (path,) = GOLDEN.glob("model-*.safetensors")
    return read_tensors(path)


@pytest.fixture(autouse=True)
def _nothing_executed() -> Iterator[None]:
    yield
    assert CANARY not in os.environ


def _decode(plan: Any, tensors: dict[str, torch.Tensor]) -> Any:
    return decode_model(Record(plan, "plan.json"), tensors, torch.device("cpu"))


def _graph(*nodes: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> fx.GraphModule:
    """A graph of one input `x` and these nodes; the last one is returned."""
    records = [
        {"name": "x", "op": "placeholder"},
        *nodes,
        {"name": "output", "op": "output", "args": [{"tuple": [{"node": nodes[-1]["name"]}]}]},
    ]
    places = [(f"plan.json: nodes[{index}]", record) for index, record in enumerate(records)]
    return decode_graph(places, ["x"], tensors or {}, TOKENS, "Net", "plan.json: nodes")


def _call(name: str, target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {
        "name": name,
        "op": "call_function",
        "target": target,
        "args": [{"node": "x"}, *args],
        **({"kwargs": kwargs} if kwargs else {}),
    }


def test_every_name_on_the_list_is_an_operator_of_this_torch() -> None:
    names = [f"aten.{name}" for name in ATEN] + [f"qdiff.{name}" for name in QDIFF]
    for name in names:
        assert target_name(resolve_target(name)) == name


@pytest.mark.parametrize("target", [operator.pow, operator.lshift, os.system, eval, getattr, aten.item.default])
def test_a_target_off_the_list_has_no_name(target: Any) -> None:
    assert target_name(target) is None


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**63),
        2**63 - 1,
        1.5,
        -0.0,
        float("inf"),
        float("-inf"),
        "nearest",
        [1, [2.0, None]],
        (1, (2,)),
        torch.float32,
        torch.bfloat16,
        torch.device("cpu"),
        torch.channels_last,
        torch.strided,
    ],
)
def test_arguments_come_back_equal_and_of_the_same_type(value: Any) -> None:
    encoded = json.loads(json.dumps(encode_argument(value, TOKENS, "here"), allow_nan=False))
    decoded = decode_argument(encoded, {}, TOKENS, "here")
    assert decoded == value and type(decoded) is type(value)


@pytest.mark.parametrize("value", [2**63, object(), slice(None), 1j, {"a": 1}])
def test_arguments_that_no_operator_takes_are_refused_when_saved(value: Any) -> None:
    with pytest.raises(CheckpointError, match="node conv: holds a"):
        encode_argument(value, TOKENS, "node conv")


def test_the_carrier_is_a_token_unless_the_dtype_is_meant_literally() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    cast = graph.call_function(aten.to.dtype, (x, torch.float32))
    fixed = graph.call_function(aten.to.dtype, (cast, torch.float32))
    FIXED_DTYPE.set(fixed, True)
    graph.output((fixed,))
    records = encode_graph(fx.GraphModule({}, graph), TOKENS, "plan.json")
    assert records[1]["args"][1] == {"dtype": "carrier"}
    assert records[2]["args"][1] == {"dtype": "float32"}

    places = [(str(index), record) for index, record in enumerate(records)]
    half = Tokens(carrier=torch.bfloat16, device=torch.device("cpu"))
    loaded = decode_graph(places, ["x"], {}, half, "Net", "nodes")
    assert [node.args[1] for node in loaded.graph.nodes if node.op == "call_function"] == [
        torch.bfloat16,
        torch.float32,
    ]


def test_a_target_off_the_list_is_refused_when_saved_with_node_and_target() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.nonzero.default, (x,)),))
    with pytest.raises(CheckpointError, match=r"node nonzero\w*: operator aten.nonzero.default is not on the list"):
        encode_graph(fx.GraphModule({}, graph), TOKENS, "plan.json")


def test_the_golden_graph_comes_back_equal(plan: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    model = _decode(copy.deepcopy(plan), tensors)
    again = encode_graph(model.plan, TOKENS, "plan.json")
    assert json.dumps(again) == json.dumps(plan["nodes"])


def test_fake_values_stay_dynamic(plan: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    model = _decode(copy.deepcopy(plan), tensors)
    (output,) = model.plan.graph.output_node().args[0]
    batch, channels, height, width = output.meta["val"].shape
    assert channels == 2
    assert all(isinstance(size, torch.SymInt) for size in (batch, height, width))


@pytest.mark.parametrize(
    "name",
    [
        f"x\n{PAYLOAD}",
        f"x;{PAYLOAD}",
        f"x={PAYLOAD}",
        "a b",
        "é",
        "",
        "1x",
        "import",
        "None",
        "__class__",
        "print",
        "x" * 5000,
        7,
        None,
        ["x"],
    ],
)
def test_a_node_name_that_is_no_plain_identifier_is_refused(name: Any) -> None:
    with pytest.raises(CheckpointError, match=r"nodes\[1\]"):
        _graph(_call("relu", "aten.relu.default") | {"name": name})


@pytest.mark.parametrize("name", [f"x={PAYLOAD}", "self", "torch", "device", "print", "*args", "lambda"])
def test_an_input_name_that_generated_code_could_trip_over_is_refused(
    name: str, plan: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    text = json.dumps(plan).replace('"sample"', json.dumps(name))
    with pytest.raises(CheckpointError, match="name"):
        _decode(json.loads(text), tensors)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "operator.pow",
        "operator.attrgetter",
        "aten.relu",
        "aten.relu.default.__class__",
        "aten.item.default",
        "aten.__class__.x",
        *(f"qdiff.{kernels}_conv2d.default" for kernels in ("x86", "vnni", "avx2")),
        "torch.load",
        f"aten.relu.default\n{PAYLOAD}",
    ],
)
def test_a_target_off_the_list_is_refused(target: str) -> None:
    with pytest.raises(CheckpointError, match="not on the list"):
        _graph(_call("node", target))


@pytest.mark.parametrize("key", [f"x={PAYLOAD}", "input=0, self", "unknown", "", "__class__"])
def test_a_keyword_that_the_operator_lacks_is_refused(key: str) -> None:
    with pytest.raises(CheckpointError, match="unknown to its operator"):
        _graph(_call("node", "aten.relu.default", **{key: 1}))


def test_a_keyword_of_a_python_function_is_refused() -> None:
    with pytest.raises(CheckpointError, match="unknown to its operator"):
        _graph(_call("node", "operator.add", b=1))


def test_an_attribute_that_is_not_in_the_file_is_refused() -> None:
    for target in ("weight", "graph", "forward", f"weight\n{PAYLOAD}", "weight.__class__"):
        with pytest.raises(CheckpointError, match="is not in the file"):
            _graph({"name": "a", "op": "get_attr", "target": target}, tensors={"other": torch.zeros(1)})


@pytest.mark.parametrize("op", ["call_module", "call_method", "root", "", 3])
def test_other_kinds_of_nodes_are_refused(op: Any) -> None:
    with pytest.raises(CheckpointError, match="op"):
        _graph(_call("node", "aten.relu.default") | {"op": op})


def test_a_node_may_only_read_what_stands_before_it() -> None:
    with pytest.raises(CheckpointError, match="does not stand before"):
        _graph(_call("node", "aten.add.Tensor", {"node": "node"}))


def test_strings_reach_the_code_as_literals_only() -> None:
    text = f'") or {PAYLOAD} or ("'
    module = _graph(_call("node", "aten.gelu.default", approximate=text))
    with pytest.raises(RuntimeError, match="approximate"):
        module(torch.zeros(1))


@pytest.mark.parametrize(
    "argument",
    [
        2**63,
        -(10**400),
        {"node": "x", "tuple": []},
        {},
        {"unknown": 1},
        {"dtype": "object"},
        {"device": "cuda:0"},
        {"float": "1"},
        [[[[[[[[]]]]]]]],
        {"tuple": [{"tuple": [[[[[1]]]]]}]},
        "\ud800",
    ],
)
def test_an_argument_that_the_format_does_not_have_is_refused(argument: Any) -> None:
    with pytest.raises(CheckpointError, match=r"nodes\[1\]"):
        _graph(_call("node", "aten.add.Tensor", argument))


@pytest.mark.parametrize(
    ("target", "args"),
    [
        ("operator.mul", [[0], 2**40]),
        ("operator.mul", ["text", 2**40]),
        ("operator.getitem", ["text", 0]),
        ("operator.getitem", [3, 0]),
        ("operator.getitem", [{"node": "sample"}, 0]),
        ("operator.add", [{"node": "sample"}, 1]),
    ],
)
def test_python_functions_take_sizes_only(
    target: str, args: list[Any], plan: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    changed = copy.deepcopy(plan)
    changed["nodes"].insert(-1, {"name": "evil", "op": "call_function", "target": target, "args": args})
    with pytest.raises(CheckpointError, match=r"evil.* is for sizes and results only"):
        _decode(changed, tensors)


@pytest.mark.parametrize("args", [[], [1], [1, 2, 3]])
def test_a_wrong_number_of_operands_is_refused(args: list[Any]) -> None:
    with pytest.raises(CheckpointError, match="argument"):
        _graph(_call("node", "operator.add") | {"args": args})


def test_a_size_that_depends_on_data_is_refused(plan: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    changed = copy.deepcopy(plan)
    mask = {"name": "mask", "op": "call_function", "target": "aten.gt.Scalar", "args": [{"node": "sample"}, 0]}
    chosen = {
        "name": "chosen",
        "op": "call_function",
        "target": "aten.index.Tensor",
        "args": [{"node": "sample"}, [{"node": "mask"}]],
    }
    changed["nodes"][-1:-1] = [mask, chosen]
    with pytest.raises(CheckpointError, match="chosen"):
        _decode(changed, tensors)


# Random tampering. Every container is a place; what is put there is another part of the plan, or hostile.

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    2,
    2**31,
    2**70,
    1.5,
    -0.0,
    "",
    "d0",
    "sample",
    "self",
    "os.system",
    "operator.pow",
    "aten.mul.Tensor",
    "../../etc/passwd",
    PAYLOAD,
    f"x\n{PAYLOAD}\n",
    f"x); {PAYLOAD} #",
    [],
    {},
    [[[[[[[[[[]]]]]]]]]],
    {"node": "sample"},
    {"tuple": []},
    {"float": "nan"},
    {"dtype": "int8"},
    {"constant": {"float": "inf"}},
)


def _containers(value: Any) -> list[Any]:
    """Every list and object in `value` that holds something, itself included."""
    found: list[Any] = []
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, (dict, list)) and current:
            found.append(current)
            pending.extend(current.values() if isinstance(current, dict) else current)
    return found


def _tamper(plan: dict[str, Any], data: st.DataObject) -> None:
    containers = _containers(plan)
    # Half of the time near the root, where a uniform choice would rarely come.
    limit = len(containers) if data.draw(st.booleans()) else min(len(containers), 40)
    container = containers[data.draw(st.integers(0, limit - 1))]
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    key = keys[data.draw(st.integers(0, len(keys) - 1))]
    kind = data.draw(st.sampled_from(("hostile", "number", "delete", "transplant", "rename")))
    if kind == "hostile":
        container[key] = copy.deepcopy(data.draw(st.sampled_from(HOSTILE)))
    elif kind == "number":
        container[key] = data.draw(st.integers(-4, 300))
    elif kind == "delete":
        del container[key]
    elif kind == "transplant":
        container[key] = copy.deepcopy(containers[data.draw(st.integers(0, len(containers) - 1))])
    elif isinstance(container, dict):
        container[data.draw(st.sampled_from(("name", "args", "node", f"a={PAYLOAD}")))] = container.pop(key)
    else:
        container.append(copy.deepcopy(container[key]))


@settings(max_examples=120)
@given(data=st.data())
def test_a_tampered_plan_is_refused_or_is_exactly_the_graph_that_it_says(
    data: st.DataObject, plan: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    changed = copy.deepcopy(plan)
    for _ in range(data.draw(st.integers(1, 2))):
        _tamper(changed, data)
    wanted = json.dumps(changed.get("nodes"))
    try:
        model = _decode(changed, tensors)
    except CheckpointError:
        return
    assert json.dumps(encode_graph(model.plan, TOKENS, "plan.json")) == wanted
