"""Copies share nothing, moves lower again, casts change nothing, pickles are refused."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdiff_fx
from qdiff_fx import kernels
from qdiff_fx.errors import BackendError, CheckpointError, QDiffWarning
from qdiff_fx.kernels import BACKENDS
from subjects import Preparer, calls_of, sketch_inputs


def noise() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def test_a_deepcopy_gives_the_same_and_shares_nothing(quantized: qdiff_fx.QuantizedUNet) -> None:
    twin, x = copy.deepcopy(quantized), noise()
    assert torch.equal(twin(x, 3).sample, quantized(x, 3).sample)
    for tensor in [*twin.plan.buffers(), *twin.plan.parameters()]:
        if tensor.is_floating_point():
            tensor.data.zero_()
    assert not torch.equal(twin(x, 3).sample, quantized(x, 3).sample)
    assert twin.lowering_report() == quantized.lowering_report()


def test_a_prepared_model_can_be_copied_before_it_is_calibrated(preparer: Preparer, sketch: nn.Module) -> None:
    prepared = preparer(sketch, example_inputs=sketch_inputs())
    twin, inputs = copy.deepcopy(prepared), sketch_inputs()
    with torch.no_grad():
        assert torch.equal(twin(*inputs), prepared(*inputs))
    qdiff_fx.calibrate(twin, calls_of(sketch), progress=False)
    assert twin.calibrated and not prepared.calibrated


def test_a_shallow_copy_is_lowered_too(quantized: qdiff_fx.QuantizedUNet) -> None:
    twin, x = copy.copy(quantized), noise()
    assert twin.plan is quantized.plan and twin.lowered is not quantized.lowered
    assert torch.equal(twin(x, 3).sample, quantized(x, 3).sample)


@pytest.mark.parametrize("write", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_a_pickle_is_refused_and_the_error_names_save(
    write: Callable[[nn.Module], Any], preparer: Preparer, sketch: nn.Module, quantized: qdiff_fx.QuantizedUNet
) -> None:
    with pytest.raises(CheckpointError, match=r"QuantizedUNet is not pickled .* use qdiff_fx.save\(model, folder\)"):
        write(quantized)
    with pytest.raises(CheckpointError, match=r"PreparedUNet is not pickled .* calibrate\(checkpoint_dir=\) keeps"):
        write(preparer(sketch, example_inputs=sketch_inputs()))


def test_a_refused_move_moves_nothing(preparer: Preparer, sketch: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, inputs = qdiff_fx.convert(preparer.fitted(sketch), backend="reference"), sketch_inputs()
    wanted = quantized(*inputs)
    elsewhere = replace(BACKENDS["reference"], unavailable=lambda device: None if device == "cpu" else "not there")
    monkeypatch.setattr(kernels, "BACKENDS", {**BACKENDS, "reference": elsewhere})
    with pytest.raises(BackendError, match="cannot run here: not there"):
        quantized.to("meta")
    assert quantized.device.type == "cpu" and torch.equal(quantized(*inputs), wanted)
    assert {tensor.device.type for tensor in (*quantized.plan.buffers(), *quantized.plan.parameters())} == {"cpu"}


def test_a_layout_copies_no_integer_weights(preparer: Preparer, sketch: nn.Module) -> None:
    """They may be mapped to their file, and kernels have layouts of their own."""
    quantized, inputs = qdiff_fx.convert(preparer.fitted(sketch), backend="reference"), sketch_inputs()
    wanted = quantized(*inputs)
    integers = {
        name: tensor.data_ptr() for name, tensor in quantized.plan.named_buffers() if not tensor.is_floating_point()
    }
    assert integers
    assert torch.equal(quantized.to(memory_format=torch.channels_last)(*inputs), wanted)
    assert integers == {name: quantized.plan.get_buffer(name).data_ptr() for name in integers}


def test_moving_to_the_device_where_it_is_changes_nothing(quantized: qdiff_fx.QuantizedUNet) -> None:
    x = noise()
    wanted = quantized(x, 3).sample
    lowered = quantized.lowered
    for moved in (quantized.to("cpu"), quantized.to(torch.float32), quantized.cpu(), quantized.float()):
        assert moved is quantized and quantized.lowered is lowered
    assert torch.equal(quantized(x, 3).sample, wanted)


def test_moving_lowers_again_for_the_new_device(preparer: Preparer, sketch: nn.Module) -> None:
    """The meta device stands for any other: no tensor may stay behind, and a compiled graph is of no use there."""
    moved = qdiff_fx.convert(preparer.fitted(sketch), backend="reference").compile(backend="eager").to("meta")
    assert moved.device.type == "meta" and moved._compiled is None
    assert {tensor.device.type for tensor in (*moved.buffers(), *moved.lowered.buffers())} == {"meta"}
    sample, timestep = sketch_inputs()
    output = moved(sample.to("meta"), timestep.to("meta"))
    assert output.device.type == "meta" and output.shape == sample.shape


@pytest.mark.parametrize("cast", ["to", "to both", "half", "bfloat16", "double"])
@pytest.mark.parametrize("stage", ["quantized", "prepared"])
def test_a_change_of_type_changes_nothing_and_names_the_way_that_does(
    cast: str, stage: str, unconditional: nn.Module, preparer: Preparer, quantized: qdiff_fx.QuantizedUNet
) -> None:
    model = quantized if stage == "quantized" else preparer(unconditional)
    x, lowered = noise(), quantized.lowered
    with torch.no_grad():
        wanted = model(x, 3).sample
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls: dict[str, Any] = {
        "to": lambda: model.to(torch.bfloat16),
        "to both": lambda: model.to("cpu", dtype=torch.float16),
        "half": model.half,
        "bfloat16": model.bfloat16,
        "double": model.double,
    }
    remedy = {
        "quantized": r"use qdiff_fx\.convert\(prepared, dtype=torch\.\w+\), or qdiff_fx\.load\(folder, dtype=torch\.",
        "prepared": r"cast the original before prepare\(\), or use qdiff_fx\.convert\(prepared, dtype=torch\.",
    }[stage]
    with pytest.warns(QDiffWarning) as caught:
        assert calls[cast]() is model
    (message,) = [str(item.message) for item in caught]
    assert re.search(f"stays in its carrier type torch.float32: .*{remedy}", message)
    after = model.state_dict()
    assert all(
        tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]) for name, tensor in before.items()
    )
    assert model.dtype == torch.float32 and quantized.lowered is lowered
    assert {parameter.dtype for parameter in unconditional.parameters()} == {torch.float32}
    with torch.no_grad():
        seen = model(x, 3).sample
    assert seen.dtype == torch.float32 and torch.equal(seen, wanted)


def test_a_cast_with_a_move_moves(preparer: Preparer, sketch: nn.Module) -> None:
    quantized = qdiff_fx.convert(preparer.fitted(sketch), backend="reference")
    with pytest.warns(QDiffWarning, match="stays in its carrier type"):
        moved = quantized.to("meta", torch.bfloat16)  # the meta device stands for any other
    assert moved.device.type == "meta" and moved.dtype == torch.float32
    assert {tensor.device.type for tensor in (*moved.buffers(), *moved.lowered.buffers())} == {"meta"}
