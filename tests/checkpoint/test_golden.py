"""Files of every released format version keep loading and keep computing what they computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qdiff_fx
from qdiff_fx.kernels.reference import integer_weight
from qdiff_fx.numerics.packing import unpack_shifts
from qdiff_fx.safe_io import read_tensors
from subjects import signal_to_noise

VERSIONS = sorted(path for path in (Path(__file__).parents[1] / "golden").iterdir() if path.name.startswith("v"))


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: str(path.name))
def test_a_golden_file_computes_its_stored_output(folder: Path) -> None:
    call = read_tensors(folder / "call.safetensors")
    model = qdiff_fx.load(folder, backend="reference")
    with torch.no_grad():
        output = model(call["sample"], call["timestep"])
    # Integers are exact on every machine, the carrier's convolution and norms are not: where one rounds a last bit
    # differently, a code next to a tie moves by one step. Sample noise of 1e-6 changes nothing here, of 1e-5 leaves
    # 41.6 dB or more (100 draws each); scales of one tensor that are 5 % off leave 37 dB or less, dropped shifts 21.
    assert signal_to_noise(call["output"], output) > 40


def test_the_first_format_holds_every_kind_of_operand() -> None:
    model = qdiff_fx.load(VERSIONS[0], backend="reference")
    tensors = model.plan.state_dict()
    targets = [str(item.target) for item in model.plan.graph.nodes if item.op == "call_function"]
    assert {"qdiff.conv2d.default", "qdiff.linear.default", "qdiff.attention.default", "qdiff.quantize.default"} <= set(
        targets
    )
    assert targets.count("qdiff.dequantize_weight.default") == 2  # the boundaries
    assert "aten.squeeze.dim" in targets  # the conv1d
    assert {"skip.weight_part0_packed", "skip.weight_part1_packed"} <= set(tensors)
    assert tensors["activation_quantizer_silu_inv_scale"].shape == (8,)
    assert tensors["grouped.weight_packed"].dtype == torch.uint8
    shift = unpack_shifts(tensors["grouped.weight_shift"], 8)
    assert shift.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    weight = integer_weight(
        tensors["grouped.weight_packed"],
        tensors["grouped.weight_zero_point"],
        tensors["grouped.weight_shift"],
        (8, 4, 3, 3),
        2,
    )
    assert weight.abs().max() > 15  # the shifts are applied
