"""A captured graph computes what the module computes, bit for bit, at any size, and shares its parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreign.guided_style import GuidedUNet
from qdiff_fx.errors import CaptureError, InputError
from qdiff_fx.examples import example_call
from qdiff_fx.graph.capture import CapturedGraph, capture
from qdiff_fx.graph.edit import get_tensor
from qdiff_fx.graph.meta import FIXED_DTYPE, MODULE_PATH
from subjects import CONTEXT, Preparer, Sketch, one_stage_unet, sketch_inputs

NO_DICT = {"return_dict": False}


def _captured(preparer: Preparer, module: nn.Module) -> CapturedGraph:
    return preparer.capture(module, *example_call(module), forced=NO_DICT)


def _run(captured: CapturedGraph, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return captured.output.unflatten(captured.graph_module(*captured.signature.flatten(args, kwargs)))


@torch.no_grad()
def _assert_equal(captured: CapturedGraph, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    wanted = module(*args, **kwargs, **NO_DICT)[0]
    assert torch.equal(_run(captured, *args, **kwargs)[0], wanted)


# Batch 1 takes another convolution algorithm on some CPUs, in the module and in the graph alike.
SIZES = [(2, 8, 8), (3, 8, 8), (1, 8, 8), (5, 12, 6), (2, 4, 16)]


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
def test_unconditional_unet_is_bit_equal_at_any_size(
    preparer: Preparer, unconditional: nn.Module, batch: int, height: int, width: int
) -> None:
    captured = _captured(preparer, unconditional)
    _assert_equal(captured, unconditional, torch.randn(batch, 3, height, width), torch.rand(batch) * 999)


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
def test_conditional_unet_is_bit_equal_at_any_size_and_context_length(
    preparer: Preparer, conditional: nn.Module, batch: int, height: int, width: int
) -> None:
    captured = _captured(preparer, conditional)
    context = torch.randn(batch, 2 * batch - 1, CONTEXT)
    _assert_equal(captured, conditional, torch.randn(batch, 3, height, width), torch.rand(batch) * 999, context)
    _assert_equal(captured, conditional, torch.randn(batch, 3, height, width), 7, encoder_hidden_states=context)


def test_the_captured_sizes_are_dynamic_and_channels_are_not(preparer: Preparer, conditional: nn.Module) -> None:
    shapes = [item.shape for item in _captured(preparer, conditional).signature.inputs]
    assert shapes == [(None, 3, None, None), (None,), (None, None, CONTEXT)]


def test_foreign_unet_with_labels_is_bit_equal() -> None:
    net = GuidedUNet().eval()
    labels = torch.tensor([1, 4])
    captured = capture(net, (torch.randn(2, 3, 8, 8), torch.tensor([3, 900])), {"y": labels})
    x, t, y = torch.randn(3, 3, 8, 12), torch.tensor([3, 900, 41]), torch.tensor([0, 2, 3])
    with torch.no_grad():
        assert torch.equal(_run(captured, x, t, y=y), net(x, t, y=y))
        assert torch.equal(_run(captured, x, torch.tensor(5), y=y), net(x, torch.tensor([5, 5, 5]), y=y))


@pytest.mark.parametrize(
    "timestep",
    [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7]), torch.tensor([7, 7, 7])],
    ids=["int", "float", "0-d int", "0-d float", "1-d of one", "1-d of the batch"],
)
def test_every_form_of_timestep_gives_the_same(preparer: Preparer, unconditional: nn.Module, timestep: Any) -> None:
    captured, x = _captured(preparer, unconditional), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        wanted = unconditional(x, torch.full((3,), 7.0)).sample
    assert torch.equal(_run(captured, x, timestep)[0], wanted)


def test_continuous_noise_levels_are_not_truncated(preparer: Preparer, unconditional: nn.Module) -> None:
    captured, x = _captured(preparer, unconditional), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = unconditional(x, torch.tensor([7.25, 800.5])).sample
    assert torch.equal(_run(captured, x, torch.tensor([7.25, 800.5]))[0], wanted)
    assert not torch.equal(_run(captured, x, torch.tensor([7.0, 800.0]))[0], wanted)


@pytest.mark.parametrize("name", ["unconditional", "conditional"])
def test_parameters_are_shared_with_the_module(preparer: Preparer, name: str, request: pytest.FixtureRequest) -> None:
    unet = request.getfixturevalue(name)
    captured = _captured(preparer, unet)
    storages = {parameter.data_ptr() for parameter in unet.parameters()}
    constants = [node for node in captured.graph_module.graph.nodes if node.op == "get_attr"]
    held = [get_tensor(captured.graph_module, node.target) for node in constants]
    assert {tensor.data_ptr() for tensor in held if isinstance(tensor, nn.Parameter)} == storages


def test_names_and_module_paths_are_those_of_the_original(preparer: Preparer, unconditional: nn.Module) -> None:
    graph = _captured(preparer, unconditional).graph_module.graph
    constants = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    assert {name for name, _ in unconditional.named_parameters()} <= constants
    convolutions = [MODULE_PATH.get(node) for node in graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert convolutions[0] == "conv_in" and convolutions[-1] == "conv_out"
    assert "up_blocks.1.resnets.0.conv_shortcut" in convolutions


def test_bfloat16_is_bit_equal_and_keeps_its_timestep_in_float32() -> None:
    unet = one_stage_unet().to(torch.bfloat16)
    captured = capture(unet, *example_call(unet), forced=NO_DICT)
    x, context = torch.randn(3, 3, 8, 8).bfloat16(), torch.randn(3, 7, CONTEXT).bfloat16()
    _assert_equal(captured, unet, x, torch.tensor([1.0, 500.0, 999.0]), context)
    dtypes = {item.name: item.dtype for item in captured.signature.inputs}
    assert dtypes == {
        "sample": torch.bfloat16,
        "timestep": torch.float32,
        "encoder_hidden_states": torch.bfloat16,
    }


def test_only_timestep_arithmetic_is_marked_as_literally_float32(preparer: Preparer, unconditional: nn.Module) -> None:
    graph = _captured(preparer, unconditional).graph_module.graph
    marked = [node for node in graph.nodes if FIXED_DTYPE.get(node)]
    assert marked, "the sinusoidal embedding names float32"
    assert {MODULE_PATH.get(node) for node in marked} <= {"", "time_proj"}
    first_layer = next(node for node in graph.nodes if node.target is torch.ops.aten.linear.default)
    assert all(node < first_layer for node in marked)
    casts = [node for node in graph.nodes if node.target is torch.ops.aten.to.dtype and node not in marked]
    assert casts, "the embedding is cast to the carrier type, which is no literal"


def test_class_labels_come_from_the_config() -> None:
    unet = one_stage_unet(num_class_embeds=4)
    args, kwargs = example_call(unet)
    assert kwargs["class_labels"].dtype == torch.int64
    captured = capture(unet, args, kwargs, forced=NO_DICT)
    x, context = torch.randn(3, 3, 8, 8), torch.randn(3, 5, CONTEXT)
    _assert_equal(captured, unet, x, torch.tensor(3.0), context, class_labels=torch.tensor([0, 3, 1]))


def test_pooled_text_and_sizes_of_sdxl_come_from_the_config() -> None:
    unet = one_stage_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=4 * 6 + 10
    )
    args, kwargs = example_call(unet)
    captured = capture(unet, args, kwargs, forced=NO_DICT)
    assert captured.signature.names == (
        "sample",
        "timestep",
        "encoder_hidden_states",
        "added_cond_kwargs_text_embeds",
        "added_cond_kwargs_time_ids",
    )
    added = {"text_embeds": torch.randn(3, 10), "time_ids": torch.rand(3, 6)}
    x, context = torch.randn(3, 3, 8, 8), torch.randn(3, 5, CONTEXT)
    _assert_equal(captured, unet, x, torch.tensor(3.0), context, added_cond_kwargs=added)
    with pytest.raises(InputError, match=r"added_cond_kwargs is not given, .* prepare the model again"):
        captured.signature.flatten((x, 3, context), {})
    with pytest.raises(InputError, match=r"added_cond_kwargs: want a dict with keys \['text_embeds', 'time_ids'\]"):
        captured.signature.flatten((x, 3, context), {"added_cond_kwargs": {"text_embeds": added["text_embeds"]}})


def test_an_inpainting_unets_nine_channels_come_from_the_config() -> None:
    args, kwargs = example_call(one_stage_unet(in_channels=9))
    assert args[0].shape == (2, 9, 8, 8) and kwargs == {}


def test_control_residuals_become_named_inputs_of_a_fixed_number() -> None:
    unet = one_stage_unet(mid_block_type="UNetMidBlock2DCrossAttn")
    args, _ = example_call(unet)

    def residuals(batch: int) -> dict[str, Any]:
        down = [torch.randn(batch, 8, 8, 8) for _ in range(2)]
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": torch.randn(batch, 8, 8, 8)}

    captured = capture(unet, args, residuals(2), forced=NO_DICT)
    assert captured.signature.names[3:] == (
        "down_block_additional_residuals_0",
        "down_block_additional_residuals_1",
        "mid_block_additional_residual",
    )
    call = (torch.randn(3, 3, 8, 8), torch.tensor(3.0), torch.randn(3, 5, CONTEXT))
    _assert_equal(captured, unet, *call, **residuals(3))
    short = residuals(3)
    short["down_block_additional_residuals"].pop()
    with pytest.raises(InputError, match="down_block_additional_residuals: want a list of 2"):
        captured.signature.flatten(call, short)
    with pytest.raises(InputError, match="down_block_additional_residuals is not given, at prepare"):
        captured.signature.flatten(call, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": torch.zeros(2, 3, 9, 8)}, r"sample: 9 x 8, want multiples of 2: .* pad the input"),
        ({"sample": torch.zeros(2, 3, 8, 7)}, r"sample: 8 x 7, want multiples of 2"),
        ({"sample": torch.zeros(2, 4, 8, 8)}, r"sample: shape \(2, 4, 8, 8\), want 3 in dimension 1"),
        ({"sample": torch.zeros(3, 8, 8)}, r"sample: shape \(3, 8, 8\), captured with 4 dimensions"),
        ({"sample": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, r"sample: torch.uint8, captured as torch.float32"),
        ({"timestep": torch.zeros(2, 1)}, r"timestep: shape \(2, 1\) for a batch of 2, captured with 1 dim"),
        ({"timestep": "5"}, r"timestep='5': want a tensor or a number"),
        ({"timestep": torch.zeros(3)}, r"timestep: shape \(3,\) for a batch of 2, captured with 1 dim"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 5)}, r"encoder_hidden_states: .* want 6 in dimension 2"),
        ({"encoder_hidden_states": None}, "encoder_hidden_states is not given, at prepare.. it was given"),
        ({"attention_mask": torch.zeros(2, 7)}, "attention_mask is given, at prepare.. it was not given"),
        ({"text": torch.zeros(1)}, "unknown argument 'text'; the model takes sample, timestep"),
    ],
)
def test_another_call_form_names_the_argument_and_the_remedy(
    preparer: Preparer, conditional: nn.Module, changes: dict[str, Any], message: str
) -> None:
    call = {"sample": torch.zeros(2, 3, 8, 8), "timestep": 1, "encoder_hidden_states": torch.zeros(2, 7, CONTEXT)}
    with pytest.raises(InputError, match=message):
        _captured(preparer, conditional).signature.flatten((), call | changes)


class Branching(nn.Module):
    """Looks at values: no graph can hold both branches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"gate": Gate()})

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.inner["gate"](sample) + timestep[:, None, None, None]


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_data_dependent_control_flow_names_the_submodule() -> None:
    with pytest.raises(CaptureError, match=r"^inner\.gate: torch\.export cannot capture it: .*data-dependent"):
        capture(Branching().eval(), (torch.zeros(2, 1, 4, 4), torch.zeros(2)))


def test_training_mode_and_batch_one_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"Sketch is in training mode; call \.eval\(\)"):
        capture(Sketch().train(), sketch_inputs())
    with pytest.raises(CaptureError, match="example sample has batch 1; want 2 or more"):
        capture(Sketch().eval(), sketch_inputs(1))


def test_a_module_that_returns_something_else_is_refused() -> None:
    class Text(nn.Module):
        def forward(self, sample: Tensor) -> Any:
            return {"sample": sample * 2, "note": object()}

    with pytest.raises(CaptureError, match="the module returns a object; want tensors"):
        capture(Text().eval(), (torch.zeros(2, 1, 4, 4),))


def test_nested_outputs_come_back_in_their_own_form() -> None:
    class Nested(nn.Module):
        def forward(self, sample: Tensor) -> Any:
            return {"sample": sample * 2, "all": [sample + 1, (sample, 3)], "none": None}

    captured = capture(Nested().eval(), (torch.zeros(2, 1, 4, 4),))
    x = torch.randn(3, 1, 6, 4)
    result = _run(captured, x)
    assert torch.equal(result["sample"], x * 2) and torch.equal(result["all"][0], x + 1)
    assert torch.equal(result["all"][1][0], x) and result["all"][1][1] == 3 and result["none"] is None


def test_the_sample_may_be_named() -> None:
    class Guided(nn.Module):
        def forward(self, picture: Tensor, sample: Tensor, timestep: Tensor) -> Tensor:
            return picture + sample * timestep[:, None, None, None]

    call = (torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), torch.zeros(2))
    assert capture(Guided().eval(), call).signature.sample == "picture"
    assert capture(Guided().eval(), call, sample_input="sample").signature.sample == "sample"
    with pytest.raises(InputError, match="sample_input='noise': want one of picture, sample, timestep"):
        capture(Guided().eval(), call, sample_input="noise")
