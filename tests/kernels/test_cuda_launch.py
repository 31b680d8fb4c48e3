"""Launchers neither wait for the GPU nor look at data: they run on fake tensors of a GPU, as a CUDA graph needs it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from cuda_cases import AttentionCase, LayerCase, prepare_attention, prepare_layer
from fake_gpu import fake_gpu
from qdiff_fx.kernels import cuda_ops
from qdiff_fx.kernels.triton_kernels import launch


class Kernel:
    """Stands in for a Triton kernel: keeps the grid and arguments of each launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.launches.append((grid, arguments, options))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Kernel]:
    found = {name: Kernel() for name in ("implicit_gemm", "image_gemm", "rescale", "attention")}
    for name, kernel in found.items():
        monkeypatch.setattr(launch, name, kernel)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    return found


def on_fake_gpu(function: Any, arguments: tuple[Any, ...]) -> Tensor:
    with fake_gpu():
        moved = [
            torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="cuda")
            if isinstance(item, Tensor)
            else item
            for item in arguments
        ]
        result: Tensor = function(*moved)
    return result


LAYERS = {
    "conv W8": LayerCase(embedding=True, residual=True, carrier=torch.bfloat16),
    "conv W4 requantized": LayerCase(stored="int4-shifted", requantize=True, silu=True, stride=(2, 2)),
    "conv grouped": LayerCase(groups=2, dilation=(2, 2), padding=(2, 2), carrier=torch.float16),
    "linear W8": LayerCase(kernel=None, residual=True, silu=True),
    "linear W4": LayerCase(kernel=None, stored="int4", requantize=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_one_launch(name: str, kernels: dict[str, Kernel]) -> None:
    case = LAYERS[name]
    prepared = prepare_layer(case)
    function = cuda_ops._linear if case.kernel is None else cuda_ops._conv2d
    result = on_fake_gpu(function, prepared.arguments)
    assert result.device.type == "cuda" and result.shape == prepared.wanted.shape
    assert result.dtype == prepared.wanted.dtype
    ((grid, _, options),) = kernels["implicit_gemm"].launches
    assert len(grid) <= 3 and options["enable_fp_fusion"] is False and not kernels["rescale"].launches


@pytest.mark.filterwarnings(
    "ignore:Accessing the data pointer of FakeTensor"
)  # an address decides nothing that is seen
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_a_layer_by_descriptors_is_one_launch(name: str, split: int, kernels: dict[str, Kernel]) -> None:
    case = LayerCase(channels=32, height=9, width=7, descriptors=True, split=split)
    if name == "linear":
        case = replace(case, kernel=None, height=40)
    prepared = prepare_layer(case)
    function = cuda_ops._linear if case.kernel is None else cuda_ops._conv2d
    assert on_fake_gpu(function, prepared.arguments).shape == prepared.wanted.shape
    ((grid, arguments, options),) = kernels["image_gemm"].launches
    tiles = 6 if name == "conv" else 3  # of 32 pixels: 4 x 8 of two images of 9 x 7; of 80 rows
    assert grid == (tiles, split) and options["enable_fp_fusion"] is False
    described = arguments[0]
    assert list(described.shape) == ([2, 9, 7, 32] if name == "conv" else [1, 1, 80, 32])
    partial, arrived = arguments[11:13]
    if split == 1:
        assert partial is arrived is None
    else:
        assert len(arrived) == tiles and len(partial) - len(arrived) == prepared.wanted.numel()


@pytest.mark.parametrize("rows", [3, 40])
def test_the_vendors_matmul_is_followed_by_one_launch(rows: int, kernels: dict[str, Kernel]) -> None:
    prepared = prepare_layer(LayerCase(kernel=None, batch=1, height=rows, channels=16, outputs=24, residual=True))
    names = [item.name for item in prepared.operator._schema.arguments]
    arguments = dict(zip(names, prepared.arguments, strict=True)) | {"kernel": "int_mm"}
    assert on_fake_gpu(cuda_ops._linear, tuple(arguments.values())).shape == prepared.wanted.shape
    assert len(kernels["rescale"].launches) == 1 and not kernels["implicit_gemm"].launches


@pytest.mark.parametrize("mask", [None, "bool", "float", "row"])
def test_an_attention_is_one_launch(mask: str | None, kernels: dict[str, Kernel]) -> None:
    case = AttentionCase(batch=2, queries=40, keys=33, mask=mask, causal=mask is None, carrier=torch.float16)
    arguments = prepare_attention(replace(case, value_head=24)).arguments
    assert on_fake_gpu(cuda_ops._attention, arguments).shape == (2, 2, 40, 24)
    ((grid, _, _),) = kernels["attention"].launches
    assert grid == (2, 4)


def test_a_launcher_that_looked_at_data_would_fail_here() -> None:
    with pytest.raises(DataDependentOutputException):
        on_fake_gpu(lambda x: x.sum().item(), (torch.ones(3),))
