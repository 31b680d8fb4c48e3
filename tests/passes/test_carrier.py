"""Changing the carrier type casts what follows it and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qdiff_fx
from qdiff_fx.graph.edit import get_tensor
from qdiff_fx.graph.meta import FIXED_DTYPE
from qdiff_fx.passes.carrier import set_carrier
from subjects import Preparer, calls_of, signal_to_noise


def _constants(graph: fx.GraphModule) -> dict[str, torch.dtype]:
    names = [str(node.target) for node in graph.graph.nodes if node.op == "get_attr"]
    return {name: get_tensor(graph, name).dtype for name in names}


@pytest.mark.parametrize("preset", ["w8a8", "w4a32"])
def test_biases_and_norms_follow_scales_and_codes_do_not(preparer: Preparer, sketch: nn.Module, preset: str) -> None:
    quantized = qdiff_fx.convert(preparer.fitted(sketch, preset), backend="reference")
    before = _constants(quantized.plan)
    signature = set_carrier(quantized.plan, quantized.signature, torch.bfloat16)
    changed = {name for name, dtype in _constants(quantized.plan).items() if dtype != before[name]}
    assert changed == {name for name in before if name.endswith(("bias", "norm.weight"))}
    assert {item.name: item.dtype for item in signature.inputs} == {
        "sample": torch.bfloat16,
        "timestep": torch.float32,
    }


@pytest.mark.parametrize("name", ["unconditional", "conditional"])
def test_fake_values_tell_what_every_node_makes(preparer: Preparer, name: str, request: pytest.FixtureRequest) -> None:
    unet = request.getfixturevalue(name)
    plan = qdiff_fx.convert(preparer.fitted(unet), backend="reference", dtype=torch.bfloat16)
    seen: dict[str, torch.dtype] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                seen[n.name] = result.dtype
            return result

    args, kwargs = calls_of(unet)[1]
    with torch.no_grad():
        Watching(plan.plan).run(*plan.signature.flatten(args, kwargs))
    values = {node.name: node.meta["val"] for node in plan.plan.graph.nodes if node.name in seen}
    assert {node: value.dtype for node, value in values.items()} == seen
    sample = values[plan.signature.sample]
    assert all(isinstance(sample.shape[axis], torch.SymInt) for axis in (0, 2, 3)), "sizes stay dynamic"


def test_the_same_carrier_changes_nothing(preparer: Preparer, sketch: nn.Module) -> None:
    quantized = qdiff_fx.convert(preparer.fitted(sketch), backend="reference")
    code = quantized.plan.code
    assert set_carrier(quantized.plan, quantized.signature, torch.float32) is quantized.signature
    assert quantized.plan.code == code


@pytest.mark.parametrize("name", ["unconditional", "conditional"])
def test_timestep_arithmetic_stays_float32_and_the_rest_runs_in_bfloat16(
    preparer: Preparer, name: str, request: pytest.FixtureRequest
) -> None:
    unet = request.getfixturevalue(name)
    prepared = preparer.fitted(unet, "w8a8")
    converted = qdiff_fx.convert(prepared, backend="reference", dtype=torch.bfloat16)
    fixed = [node for node in converted.plan.graph.nodes if FIXED_DTYPE.get(node)]
    literals = [item for node in fixed for item in (*node.args, *node.kwargs.values()) if isinstance(item, torch.dtype)]
    assert set(literals) == {torch.float32}
    args, kwargs = calls_of(unet)[1]
    float32 = qdiff_fx.convert(prepared, backend="reference")
    with torch.no_grad():
        assert converted(*args, **kwargs).sample.dtype == torch.float32  # the caller's type
        seen = converted(args[0].to(torch.bfloat16), *args[1:], **kwargs).sample
        assert seen.dtype == torch.bfloat16
        # The carrier's 8 bits, rounded in every operator: tens of roundings of 2^-9 leave 35 dB or so.
        assert signal_to_noise(float32(*args, **kwargs).sample, seen) > 25


def test_the_prepared_model_is_not_cast_along(preparer: Preparer, sketch: nn.Module) -> None:
    prepared = preparer.fitted(sketch)
    qdiff_fx.convert(prepared, backend="reference", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in sketch.parameters()} == {torch.float32}
    (x, t), _ = calls_of(sketch)[0]
    assert prepared(x, t).dtype == torch.float32
