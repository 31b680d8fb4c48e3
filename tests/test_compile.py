"""Quantized models compile whole, and do not recompile over batches and resolutions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import qdiff_fx
from subjects import Preparer, sketch_inputs


@pytest.fixture(scope="session")
def quantized_sketch(preparer: Preparer, sketch: nn.Module) -> qdiff_fx.QuantizedUNet:
    return qdiff_fx.convert(preparer.fitted(sketch, "w4a8"), backend="reference")


@pytest.fixture
def no_recompiles() -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


class CountingBackend:
    """Counts the graphs that dynamo hands over and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph_module: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        self.graphs += 1
        return graph_module


SHAPES = [(batch, height, width) for batch in range(2, 9) for height, width in ((8, 8), (16, 16), (8, 12))]


def _inputs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, height, width), torch.rand(batch) * 999


def test_torch_compile_takes_the_whole_model(quantized_sketch: qdiff_fx.QuantizedUNet) -> None:
    compiled = torch.compile(quantized_sketch, fullgraph=True)
    inputs = sketch_inputs()
    with torch.no_grad():
        # The carrier's operators are fused, which moves last bits; quantizers may turn one into a step.
        difference = (compiled(*inputs) - quantized_sketch(*inputs)).abs().max()
    assert difference < 0.05 * quantized_sketch(*inputs).abs().max()


def test_torch_compile_takes_a_diffusers_unet_whole(preparer: Preparer, unconditional: nn.Module) -> None:
    quantized = qdiff_fx.convert(preparer.fitted(unconditional), backend="reference")
    counting = CountingBackend()
    compiled = torch.compile(quantized, fullgraph=True, backend=counting)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(compiled(x, 5).sample, quantized(x, 5).sample)
    assert counting.graphs == 1


@pytest.mark.usefixtures("no_recompiles")
def test_the_check_would_notice_a_recompile(quantized_sketch: qdiff_fx.QuantizedUNet) -> None:
    """Without `compile()` marking dimensions, the second batch size recompiles: the tests below can fail."""
    compiled = torch.compile(quantized_sketch.lowered, fullgraph=True, backend=CountingBackend(), dynamic=False)
    signature = quantized_sketch.signature
    with torch.no_grad():
        compiled(*signature.flatten(_inputs(2, 8, 8), {}))
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(*signature.flatten(_inputs(3, 8, 8), {}))


@pytest.mark.usefixtures("no_recompiles")
@pytest.mark.parametrize("first", [(2, 8, 8), (5, 8, 12)], ids=str)
def test_one_compilation_serves_every_batch_and_resolution(
    preparer: Preparer, sketch: nn.Module, first: tuple[int, int, int]
) -> None:
    quantized = qdiff_fx.convert(preparer.fitted(sketch), backend="reference")
    plain = {shape: _inputs(*shape) for shape in [first, *SHAPES]}
    with torch.no_grad():
        wanted = {shape: quantized(*inputs) for shape, inputs in plain.items()}
        counting = CountingBackend()
        assert quantized.compile(backend=counting) is quantized
        for shape, inputs in plain.items():
            assert torch.equal(quantized(*inputs), wanted[shape]), shape
    assert counting.graphs == 1


def test_batch_one_costs_at_most_one_more(preparer: Preparer, sketch: nn.Module) -> None:
    quantized = qdiff_fx.convert(preparer.fitted(sketch), backend="reference")
    counting = CountingBackend()
    quantized.compile(backend=counting)
    with torch.no_grad():
        for shape in [(2, 8, 8), (1, 8, 8), (3, 8, 8), (1, 8, 8), (4, 8, 12)]:
            assert quantized(*_inputs(*shape)).shape == (shape[0], 2, *shape[1:])
    assert counting.graphs == 2


@pytest.mark.usefixtures("no_recompiles")
def test_contexts_of_every_length_share_one_compilation(preparer: Preparer, conditional: nn.Module) -> None:
    quantized = qdiff_fx.convert(preparer.fitted(conditional), backend="reference")
    counting = CountingBackend()
    quantized.compile(backend=counting)
    with torch.no_grad():
        for batch, side, tokens in [(2, 8, 7), (3, 8, 5), (8, 12, 16), (2, 16, 7)]:
            x, context = torch.randn(batch, 3, side, 8), torch.randn(batch, tokens, 6)
            assert quantized(x, 500, encoder_hidden_states=context).sample.shape == x.shape
    assert counting.graphs == 1


@pytest.mark.usefixtures("no_recompiles")
def test_inductor_serves_every_batch_and_resolution(quantized_sketch: qdiff_fx.QuantizedUNet) -> None:
    import copy

    quantized = copy.deepcopy(quantized_sketch).compile()
    with torch.no_grad():
        for shape in [(2, 8, 8), (3, 8, 12), (8, 16, 16)]:
            inputs = _inputs(*shape)
            wanted = quantized_sketch(*inputs)
            assert (quantized(*inputs) - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_a_change_of_grad_mode_compiles_nothing_anew(
    preparer: Preparer, sketch: nn.Module, no_recompiles: None
) -> None:
    quantized = qdiff_fx.convert(preparer.fitted(sketch), backend="reference").compile(backend="eager")
    plain = sketch_inputs()
    wanted = quantized(*plain)
    with torch.inference_mode():
        inference = tuple(value.clone() for value in plain)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for inputs in (plain, inference):
            with mode():
                assert torch.equal(quantized(*inputs), wanted)


def test_compiling_leaves_the_callers_tensors_unmarked(preparer: Preparer, sketch: nn.Module) -> None:
    """A mark on them would make every other compiled model that reads them dynamic, or fail."""
    quantized = qdiff_fx.convert(preparer.fitted(sketch), backend="reference").compile(backend=CountingBackend())
    inputs = sketch_inputs()
    with torch.no_grad():
        quantized(*inputs)
    assert not any(hasattr(value, "_dynamo_dynamic_indices") for value in inputs)


def test_compiled_models_do_not_check_their_own_tensors_and_stay_apart(preparer: Preparer, sketch: nn.Module) -> None:
    """A guard a tensor costs milliseconds a call; without them, each model must still run its own."""
    torch.manual_seed(1)
    other = type(sketch)().eval()
    models = [qdiff_fx.convert(preparer.fitted(item), backend="reference") for item in (sketch, other)]
    inputs = sketch_inputs()
    with torch.no_grad():
        wanted = [model(*inputs) for model in models]
        assert not torch.equal(*wanted)
        for model in models:
            model.compile(backend=CountingBackend())
        for model, result in zip(models, wanted, strict=True):
            assert torch.equal(model(*inputs), result)
            (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(model.lowered.forward.__code__)
            guards = str(entry.guard_manager)
            assert "L['sample']" in guards and "L['self']" not in guards.replace("source=L['self'], accessed", "")
