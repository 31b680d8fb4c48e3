"""Every family: captured without a difference, shortcuts and attentions found, quantized, stored, loaded, run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import qdiff_fx
from families import SMALL, FamilyRun, attentions, fill, shortcuts
from qdiff_fx.errors import InputError
from subjects import signal_to_noise

FAMILIES = pytest.mark.parametrize("name", SMALL)
Chain = Callable[[str], FamilyRun]


@FAMILIES
def test_the_captured_graph_is_bit_equal(name: str, chain: Chain) -> None:
    run = chain(name)
    for seed, call in enumerate([run.calls[1], fill(run.calls[0], 250.0, 9, batch=3, height=16, width=8)]):
        args, kwargs = call
        with torch.no_grad():
            wanted = run.model(*args, **kwargs, return_dict=False)
            seen = run.captured.graph_module(*run.captured.signature.flatten(args, kwargs))
        leaves = torch.utils._pytree.tree_leaves(wanted)
        assert len(leaves) == len(seen), seed
        assert all(torch.equal(left, right) for left, right in zip(leaves, seen, strict=True)), seed


@FAMILIES
def test_shortcuts_and_attentions_are_found(name: str, chain: Chain) -> None:
    run = chain(name)
    assert shortcuts(run.prepared.graph_module) == run.family.shortcuts
    assert attentions(run.prepared.graph_module) == run.family.attentions


@FAMILIES
def test_what_was_stored_runs_as_what_was_converted(name: str, chain: Chain) -> None:
    run = chain(name)
    loaded = qdiff_fx.load(run.folder, backend="reference")
    args, kwargs = fill(run.calls[0], 420.0, 11, batch=3, height=8, width=16)
    with torch.no_grad():
        full = run.model(*args, **kwargs, return_dict=False)
        wanted = run.quantized(*args, **kwargs, return_dict=False)
        seen = loaded(*args, **kwargs, return_dict=False)
    leaves = [torch.utils._pytree.tree_leaves(item) for item in (full, wanted, seen)]
    for original, converted, stored in zip(*leaves, strict=True):
        assert torch.equal(converted, stored)
        assert signal_to_noise(original, stored) > 8


def test_a_controlnet_keeps_its_output_class(chain: Chain) -> None:
    run = chain("controlnet")
    args, kwargs = run.calls[1]
    with torch.no_grad():
        wanted, seen = run.model(*args, **kwargs), qdiff_fx.load(run.folder, backend="reference")(*args, **kwargs)
    assert type(seen) is type(wanted) and len(seen.down_block_res_samples) == len(wanted.down_block_res_samples)
    assert seen.mid_block_res_sample.shape == wanted.mid_block_res_sample.shape


def test_another_set_of_inputs_than_at_prepare_names_the_remedy(chain: Chain) -> None:
    plain, controlled = chain("sd-1"), chain("controlled")
    args, kwargs = controlled.calls[0]
    with pytest.raises(InputError, match=r"down_block_additional_residuals is given, .* prepare the model again"):
        plain.quantized(*plain.calls[0][0], **kwargs)
    with pytest.raises(InputError, match=r"down_block_additional_residuals is not given, .* prepare the model again"):
        controlled.quantized(*args)
    maps = kwargs["down_block_additional_residuals"]
    with pytest.raises(InputError, match="down_block_additional_residuals: want a tuple of 2"):
        controlled.quantized(*args, **{**kwargs, "down_block_additional_residuals": maps[:1]})
    adapted = chain("ip-adapter")
    with pytest.raises(InputError, match=r"added_cond_kwargs is not given, .* prepare the model again"):
        adapted.quantized(*adapted.calls[0][0])
    picture = chain("controlnet").calls[0]
    with pytest.raises(InputError, match=r"conditioning_scale=0\.5, captured with the constant 1\.0"):
        chain("controlnet").quantized(*picture[0], **{**picture[1], "conditioning_scale": 0.5})


@pytest.mark.slow
@FAMILIES
def test_one_compilation_serves_batches_and_resolutions(name: str, chain: Chain) -> None:
    run = chain(name)
    quantized, graphs = qdiff_fx.load(run.folder, backend="reference"), list[torch.fx.GraphModule]()

    def counting(graph_module: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph_module)
        return graph_module

    shapes = [(2, 8, 8), (3, 16, 16), (4, 8, 16)]
    calls = [fill(run.calls[0], 300.0, seed, batch=b, height=h, width=w) for seed, (b, h, w) in enumerate(shapes)]
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        wanted = [quantized(*args, **kwargs, return_dict=False) for args, kwargs in calls]
        quantized.compile(backend=counting)
        for (args, kwargs), result in zip(calls, wanted, strict=True):
            torch.testing.assert_close(quantized(*args, **kwargs, return_dict=False), result, rtol=0, atol=0)
    assert len(graphs) == 1
