"""Every family: captured without a difference, shortcuts and attentions found, quantized, stored, loaded, run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import qdiff_fx
from families import SMALL, FamilyRun, attentions, fill, shortcuts
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
        if original.abs().max() > 0:  # a new ControlNet's outputs are zero
            assert signal_to_noise(original, stored) > 8
