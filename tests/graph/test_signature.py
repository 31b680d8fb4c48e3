"""Calls map to flat inputs and back; what differs from the captured call is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdiff_fx.errors import InputError
from qdiff_fx.graph.signature import CallSignature, bind_call, derive_signature


class Module(nn.Module):
    def forward(
        self, sample: Tensor, timestep: Any, context: Any = None, scale: float = 1.0, return_dict: bool = True
    ) -> Tensor:
        return sample


def _signature(*args: Any, **kwargs: Any) -> CallSignature:
    return derive_signature(Module(), args, kwargs)[0]


SAMPLE, TIMESTEP = torch.zeros(2, 1, 4, 4), torch.zeros(2)


def test_nested_conditions_come_back_as_they_went_in() -> None:
    context = {"tokens": torch.ones(2, 3, 4), "list": [torch.zeros(2, 1), (torch.zeros(2, 2), None, "text")]}
    signature, values = derive_signature(Module(), (SAMPLE, TIMESTEP), {"context": context, "scale": 2.0})
    assert signature.names == ("sample", "timestep", "context_tokens", "context_list_0", "context_list_1_0")
    restored = signature.unflatten(values)
    assert restored["scale"] == 2.0 and restored["context"]["list"][1][1:] == (None, "text")
    assert restored["context"]["tokens"] is context["tokens"]
    again = signature.flatten((SAMPLE, TIMESTEP), {"context": context, "scale": 2.0})
    assert all(torch.equal(left, right) for left, right in zip(values, again, strict=True))


def test_a_constant_of_the_capture_must_stay() -> None:
    signature = _signature(SAMPLE, TIMESTEP, scale=2.0)
    with pytest.raises(InputError, match=r"scale=3\.0, captured with the constant 2\.0; prepare the model again"):
        signature.flatten((SAMPLE, TIMESTEP), {"scale": 3.0})


def test_none_is_the_same_as_not_given() -> None:
    signature = _signature(SAMPLE, TIMESTEP, None)
    assert signature.names == ("sample", "timestep")
    assert len(signature.flatten((SAMPLE, TIMESTEP), {"context": None})) == 2


def test_return_dict_is_no_input() -> None:
    assert _signature(SAMPLE, TIMESTEP, return_dict=False).parameters == ("sample", "timestep", "context", "scale")


def test_arguments_given_twice_or_too_many_are_refused() -> None:
    with pytest.raises(InputError, match="argument sample given twice"):
        bind_call(("sample",), (1,), {"sample": 2})
    with pytest.raises(InputError, match="2 positional arguments, the model takes 1: sample"):
        bind_call(("sample",), (1, 2), {})


def test_variable_arguments_are_refused_with_the_remedy() -> None:
    class Variable(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return inputs[0]

    with pytest.raises(InputError, match=r"Variable\.forward takes \*args; wrap it in a module"):
        derive_signature(Variable(), (SAMPLE,), {})


def test_a_call_without_tensors_or_with_strange_leaves_is_refused() -> None:
    with pytest.raises(InputError, match=r"holds no tensor; pass example_inputs=\(sample, timestep"):
        _signature("text", None)
    with pytest.raises(InputError, match="context: object; want tensors, numbers"):
        _signature(SAMPLE, TIMESTEP, object())


def test_floating_inputs_follow_the_captured_type_and_integers_stay() -> None:
    signature = _signature(SAMPLE, TIMESTEP, torch.zeros(2, dtype=torch.int64))
    sample, timestep, labels = signature.flatten(
        (SAMPLE.double(), torch.tensor([1, 2]), torch.ones(2, dtype=torch.int64)), {}
    )
    assert sample.dtype == torch.float32 and timestep.dtype == torch.float32 and labels.dtype == torch.int64


def test_one_noise_level_is_spread_over_the_batch() -> None:
    signature = _signature(SAMPLE, TIMESTEP)
    for given in (3, 3.0, torch.tensor(3), torch.tensor([3.0])):
        flat = signature.flatten((SAMPLE, given), {})[1]
        assert flat.tolist() == [3.0, 3.0] and flat.is_contiguous()
