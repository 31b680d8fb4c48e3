"""A layer behind a channel cat becomes a sum of layers, one for each operand; everything near it is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pass_checks import ROUNDING, PassRun, double, run_pass
from qdiff_fx.config import QDiffConfig
from qdiff_fx.graph.edit import get_tensor
from qdiff_fx.graph.meta import MODULE_PATH, SPLIT_ADD, SPLIT_PART
from qdiff_fx.passes.prepare.split_shortcuts import SplitShortcuts


class Shortcut(nn.Module):
    """cat of `sizes` channels -> `between` -> `layer`; operands come from convolutions of the sample."""

    def __init__(
        self, layer: nn.Module, between: Callable[[Tensor], Tensor] = lambda x: x, sizes: tuple[int, ...] = (4, 6)
    ) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(2, size, 3, padding=1) for size in sizes)
        self.layer, self.between = layer, between
        self.double()

    def forward(self, sample: Tensor) -> Tensor:
        return self.layer(self.between(torch.cat([stem(sample) for stem in self.stems], dim=1)))


def _split(module: nn.Module, *inputs: Tensor, **options: Any) -> PassRun:
    return run_pass(SplitShortcuts(), module, inputs or (double(2, 2, 8, 8),), **options)


def _parts(run: PassRun) -> list[tuple[int, int, int]]:
    found = [SPLIT_PART.get(node) for node in run.nodes]
    return [(part.index, part.start, part.stop) for part in found if part is not None]


def _adds(run: PassRun) -> int:
    return sum(bool(SPLIT_ADD.get(node)) for node in run.nodes)


@pytest.mark.parametrize("sizes", [(4, 6), (3, 4, 5), (1, 1, 1, 7)], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_splits_into_one_for_each_operand(sizes: tuple[int, ...], kernel: int) -> None:
    layer = nn.Conv2d(sum(sizes), 5, kernel, stride=2, padding=kernel // 2, dilation=1)
    run = _split(Shortcut(layer, sizes=sizes))
    assert run.result.modified and len(run.result.rewrites) == 1 and not run.reasons
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    assert _parts(run) == [(index, end - size, end) for index, (size, end) in enumerate(zip(sizes, ends, strict=True))]
    assert _adds(run) == len(sizes) - 1 and run.count("cat") == 0
    assert run.count("conv2d") == 2 * len(sizes)
    assert run.error() < ROUNDING


def test_the_bias_goes_to_the_first_part_and_paths_stay() -> None:
    run = _split(Shortcut(nn.Conv2d(10, 3, 1)))
    parts = [node for node in run.nodes if SPLIT_PART.get(node)]
    biases = [node.args[2] if len(node.args) > 2 else None for node in parts]
    assert biases[0] is not None and biases[1] is None
    assert {MODULE_PATH.get(node) for node in parts} == {"layer"}


def test_part_weights_are_views_of_the_original_storage() -> None:
    module = Shortcut(nn.Conv2d(10, 3, 1))
    run = _split(module)
    first, second = (get_tensor(run.graph_module, f"layer.weight_part{index}") for index in (0, 1))
    weight = module.layer.weight
    assert torch.equal(torch.cat([first, second], dim=1), weight)
    assert (
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    )


RANGE_KEEPING: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: functional.dropout(x, 0.5, training=False),
    "to": lambda x: x.to(torch.float32).to(torch.float64),
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "clone": lambda x: x.clone(),
    "nearest upsampling": lambda x: functional.interpolate(x, scale_factor=2.0, mode="nearest"),
    "average pooling": lambda x: functional.avg_pool2d(x, 2),
    "maximum pooling": lambda x: functional.max_pool2d(x, 2),
    "two in a row": lambda x: functional.interpolate(functional.dropout(x, 0.1, False), scale_factor=2.0).contiguous(),
}


@pytest.mark.parametrize("name", RANGE_KEEPING)
def test_range_keeping_operators_are_walked_through(name: str) -> None:
    run = _split(Shortcut(nn.Conv2d(10, 3, 1), RANGE_KEEPING[name]))
    assert run.result.modified and _adds(run) == 1
    # A cast to float32 rounds before the sum either way; what follows is float64.
    assert run.error() < ROUNDING


TO_LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "permute and reshape": lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]),
    "permute and view": lambda x: x.permute(0, 2, 3, 1).contiguous().view(x.shape[0], -1, x.shape[1]),
    "flatten and transpose": lambda x: x.flatten(2).transpose(1, 2),
    "reshape and permute": lambda x: x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
}


@pytest.mark.parametrize("name", TO_LINEAR)
def test_a_linear_layer_splits_through_rearrangements(name: str) -> None:
    run = _split(Shortcut(nn.Linear(10, 3), TO_LINEAR[name]))
    assert _parts(run) == [(0, 0, 4), (1, 4, 10)]
    assert run.count("linear") == 2 and run.error() < ROUNDING


def test_a_view_that_only_the_contiguous_cat_allows_still_runs_on_the_parts() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layer = nn.Conv2d(2, 4, 1), nn.Linear(8, 3)
            self.double()

        def forward(self, sample: Tensor) -> Tensor:
            tokens = self.stem(sample).permute(0, 2, 3, 1)  # strided
            joined = torch.cat([tokens, tokens.sin()], dim=-1)
            return self.layer(joined.view(-1, sample.shape[3], 8))

    run = _split(Strided())
    assert _adds(run) == 1 and run.error() < ROUNDING


def test_a_conv1d_splits() -> None:
    run = _split(Shortcut(nn.Conv1d(10, 3, 3, padding=1), lambda x: x.flatten(2)))
    assert run.count("conv1d") == 2 and run.error() < ROUNDING


def test_the_cat_stays_for_a_normalisation_that_also_reads_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 8)
            self.conv, self.skip = nn.Conv2d(8, 3, 3, padding=1), nn.Conv2d(8, 3, 1)
            self.double()

        def forward(self, sample: Tensor) -> Tensor:
            first = self.stem(sample)
            joined = torch.cat([first, first.sin()], dim=1)
            return self.skip(joined) + self.conv(functional.silu(self.norm(joined)))

    run = _split(Block())
    # The convolution behind the normalisation is an ordinary layer.
    assert run.count("cat") == 1 and run.count("conv2d") == 4 and _adds(run) == 1
    assert run.error() < ROUNDING


def test_two_layers_behind_one_cat_both_split() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(8, 3, 1), nn.Conv2d(8, 3, 1)
            self.double()

        def forward(self, sample: Tensor) -> Tensor:
            joined = torch.cat([self.stem(sample), self.stem(sample).sin()], dim=1)
            return self.a(joined) * self.b(joined)

    run = _split(Two())
    assert len(run.result.rewrites) == 2 and run.count("cat") == 0 and run.error() < ROUNDING


def test_nested_cats_split_down_to_the_innermost_operands() -> None:
    nested = Shortcut(nn.Conv2d(14, 3, 1), lambda x: torch.cat([x, x[:, :4] * 2], dim=1))
    run = _split(nested)
    assert _parts(run) == [(0, 0, 4), (1, 4, 10), (1, 10, 14)] and run.error() < ROUNDING


ENDING: dict[str, Callable[[Tensor], Tensor]] = {
    "normalisation": lambda x: functional.group_norm(x, 2),
    "nonlinearity": functional.silu,
    "scaling": lambda x: x * 0.5,
    "channels that mix with rows": lambda x: x.transpose(1, 2).reshape(x.shape[0], 10, 8, 8),
}


@pytest.mark.parametrize("name", ENDING)
def test_other_operators_end_the_pattern(name: str) -> None:
    run = _split(Shortcut(nn.Conv2d(10, 3, 1), ENDING[name]))
    assert not run.result.modified and not run.reasons


def test_the_switch_turns_the_pass_off() -> None:
    run = _split(Shortcut(nn.Conv2d(10, 3, 1)), config=QDiffConfig(split_shortcuts=False))
    assert not run.result.modified and not run.reasons


def test_a_cat_on_another_dimension_is_refused() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layer = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

        def forward(self, sample: Tensor) -> Tensor:
            h = self.stem(sample)
            return self.layer(torch.cat([h, h], dim=2))

    run = _split(Rows(), torch.randn(2, 2, 8, 8))
    assert run.reasons == ["the cat joins dimension 2, the layer's channels are dimension 1"]
    assert not run.result.modified


def test_a_grouped_convolution_is_refused() -> None:
    run = _split(Shortcut(nn.Conv2d(10, 4, 1, groups=2)))
    assert run.reasons == ["groups=2: a part's channels would cross groups"] and not run.result.modified


def test_a_computed_weight_is_refused() -> None:
    class Normalised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return functional.conv2d(x, self.weight / self.weight.norm(), self.bias)

    run = _split(Shortcut(Normalised(10, 3, 1)))
    assert run.reasons == ["its weight is computed in the graph"] and not run.result.modified


class Inpainting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(5, 3, 3, padding=1)
        self.double()

    def forward(self, sample: Tensor, mask: Tensor, picture: Tensor) -> Tensor:
        return self.layer(torch.cat([sample, mask, picture], dim=1))


def test_a_layer_that_reads_the_noisy_sample_is_refused_unless_boundaries_are_quantized() -> None:
    inputs = (double(2, 2, 4, 4), double(2, 1, 4, 4), double(2, 2, 4, 4))
    run = _split(Inpainting(), *inputs)
    assert run.reasons == ["it reads the noisy sample, which stays in the carrier type"]
    run = _split(Inpainting(), *inputs, config=QDiffConfig(quantize_boundaries=True))
    assert _parts(run) == [(0, 0, 2), (1, 2, 3), (2, 3, 5)] and run.error() < ROUNDING


def test_an_embedding_is_no_shortcut() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.stem = nn.Linear(2, 4), nn.Conv2d(2, 4, 1)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            waves = torch.cat([timestep[:, None].sin(), timestep[:, None].cos()], dim=1)
            return self.stem(sample) + self.embed(waves)[:, :, None, None]

    run = _split(Embedding(), torch.randn(2, 2, 4, 4), torch.rand(2))
    assert run.reasons == ["it does not depend on the sample: an embedding, no shortcut"]
