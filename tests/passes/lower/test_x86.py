"""Models lowered to x86: same codes and layers as the reference's, compiled in one graph, copied, moved and saved."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import qdiff_fx
from factor_latency import give_random_factors
from qdiff_fx.assets import load_conditional, load_unconditional
from qdiff_fx.calibration.driver import fit_activations, fit_weights
from qdiff_fx.kernels import BACKENDS, x86_norms
from qdiff_fx.kernels.x86_native import VNNI, load_kernels
from qdiff_fx.passes.lower import x86_attention
from subjects import Sketch, calls_of, conditional_unet, signal_to_noise, sketch_inputs

aten = torch.ops.aten
qdiff = torch.ops.qdiff

_REASON = BACKENDS["x86"].unavailable("cpu")
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


@pytest.fixture(scope="module")
def prepared(sketch: nn.Module, preparer: Any) -> qdiff_fx.PreparedUNet:
    return observed(sketch, preparer, "w4a8")


def observed(module: nn.Module, preparer: Any, preset: str) -> qdiff_fx.PreparedUNet:
    call = {"example_inputs": sketch_inputs()} if isinstance(module, Sketch) else {}
    result: qdiff_fx.PreparedUNet = preparer(module, qdiff_fx.QDiffConfig.preset(preset), **call)
    for args, kwargs in calls_of(module):
        result(*args, **kwargs)
    return result


def targets(graph_module: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def count(graph_module: fx.GraphModule, prefix: str) -> int:
    return sum(str(target).startswith(prefix) for target in targets(graph_module))


INTEGER_LAYER = re.compile(r"qdiff\.(x86|vnni|avx2)_(conv2d|linear)\.default")
INTEGER_ATTENTION = "qdiff.vnni_attention.default"


def test_every_integer_layer_runs_on_integer_kernels(prepared: qdiff_fx.PreparedUNet) -> None:
    model = qdiff_fx.convert(prepared, backend="x86")
    integer = count(model.plan, "qdiff.conv2d") + count(model.plan, "qdiff.linear")
    assert integer > 0
    own = [str(item) for item in targets(model.lowered) if str(item).startswith("qdiff")]
    own = [item for item in own if item != INTEGER_ATTENTION]
    assert len(own) == integer and all(map(INTEGER_LAYER.fullmatch, own))


def test_the_plan_is_left_as_it_was(prepared: qdiff_fx.PreparedUNet) -> None:
    reference = qdiff_fx.convert(prepared, backend="reference")
    lowered = qdiff_fx.convert(prepared, backend="x86")
    assert lowered.plan.code == reference.plan.code
    assert set(lowered.state_dict()) == set(reference.state_dict())


def test_quality_is_that_of_the_reference(sketch: nn.Module, prepared: qdiff_fx.PreparedUNet) -> None:
    reference = qdiff_fx.convert(prepared, backend="reference")
    strict = qdiff_fx.convert(prepared, backend="x86", strict=True)
    rounded = qdiff_fx.convert(prepared, backend="x86", dtype=torch.bfloat16)
    sample, timestep = sketch_inputs(16)
    with torch.no_grad():
        full = sketch(sample, timestep)
    quality = {
        name: signal_to_noise(full, model(sample.to(model.dtype), timestep).float())
        for name, model in (("reference", reference), ("x86", strict), ("bfloat16", rounded))
    }
    # The bounds of DESIGN.md's integer semantics: one last bit of the carrier moves later codes.
    assert abs(quality["x86"] - quality["reference"]) < 0.5
    assert quality["bfloat16"] > quality["reference"] - 3.0


@pytest.mark.skipif(not load_kernels(VNNI), reason="the CPU has no AVX512-VNNI")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_multiplies_bytes(
    sketch: nn.Module, prepared: qdiff_fx.PreparedUNet, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(x86_attention, "native_kernels", lambda: VNNI)
    model = qdiff_fx.convert(prepared, backend="x86", dtype=dtype)
    assert qdiff.vnni_attention.default in targets(model.lowered)
    assert not {aten.scaled_dot_product_attention.default, qdiff.attention.default} & set(targets(model.lowered))
    rows = model.lowering_report().rows
    reference = qdiff_fx.convert(prepared, backend="reference")
    planned_rows = [row for row in reference.lowering_report().rows if "attention" in row.kernel]
    assert [(row.layer, row.kernel) for row in rows if "attention" in row.kernel] == [
        (row.layer, "qdiff.vnni_attention") for row in planned_rows
    ]
    assert not any(row.fallback for row in rows)
    sample, timestep = sketch_inputs(16)
    with torch.no_grad():
        full, planned = sketch(sample, timestep), reference(sample, timestep)
        result = model(sample.to(dtype), timestep)
    assert result.dtype == dtype
    assert signal_to_noise(full, result.float()) > signal_to_noise(full, planned) - 0.5


def test_attention_leaves_its_quantizers_without_a_kernel(
    prepared: qdiff_fx.PreparedUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(x86_attention, "native_kernels", lambda: None)
    model = qdiff_fx.convert(prepared, backend="x86")
    assert aten.scaled_dot_product_attention.default in targets(model.lowered)
    rows = [row for row in model.lowering_report().rows if row.fallback]
    assert len(rows) == 1 and "dropped" in rows[0].fallback and not rows[0].simulated
    strict = qdiff_fx.convert(prepared, backend="x86", strict=True)
    assert qdiff.attention.default in targets(strict.lowered)
    rows = [row for row in strict.lowering_report().rows if row.fallback]
    assert len(rows) == 1 and rows[0].simulated


def test_the_report_names_stored_widths_and_bytes(prepared: qdiff_fx.PreparedUNet) -> None:
    rows = qdiff_fx.convert(prepared, backend="x86").lowering_report().rows
    reference = qdiff_fx.convert(prepared, backend="reference").lowering_report().rows
    assert [(row.layer, row.dtype, row.bytes) for row in rows] == [
        (row.layer, row.dtype, row.bytes) for row in reference
    ]
    assert any(row.kernel == "aten.conv2d on dequantized weight" for row in rows)


def test_weights_behind_carrier_inputs_are_dequantized_once(sketch: nn.Module, preparer: Any) -> None:
    model = qdiff_fx.convert(observed(sketch, preparer, "w4a32"), backend="x86")
    reference = qdiff_fx.convert(observed(sketch, preparer, "w4a32"), backend="reference")
    assert qdiff.dequantize_weight.default not in targets(model.lowered)
    inputs = sketch_inputs()
    # The same weights in another memory layout: sums of float32 run in another order.
    assert signal_to_noise(reference(*inputs), model(*inputs)) > 100.0


def test_a_copy_runs_alone(prepared: qdiff_fx.PreparedUNet) -> None:
    # A copy of its own: the plan shares tensors with the network of other tests, and they are zeroed here.
    model = qdiff_fx.convert(copy.deepcopy(prepared), backend="x86")
    inputs = sketch_inputs()
    wanted = model(*inputs)
    clone = copy.deepcopy(model)
    for tensor in model.plan.state_dict().values():
        tensor.zero_()
    assert torch.equal(clone(*inputs), wanted)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_one_graph_for_every_batch_and_size(prepared: qdiff_fx.PreparedUNet, dtype: torch.dtype) -> None:
    model = qdiff_fx.convert(prepared, backend="x86", dtype=dtype)
    eager = copy.deepcopy(model)
    model.compile()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for batch, height, width in [(2, 8, 8), (3, 8, 16), (8, 12, 8), (5, 16, 16)]:
            sample = torch.randn(batch, 2, height, width).to(dtype)
            timestep = torch.linspace(1.0, 999.0, batch)
            wanted, result = eager(sample, timestep), model(sample, timestep)
            assert result.dtype == dtype
            # Fused kernels round the carrier elsewhere; a few codes move. 8 bits hold about 40 dB.
            assert signal_to_noise(wanted.float(), result.float()) > 30.0


@pytest.mark.usefixtures("unchecked_shapes")
def test_grad_mode_does_not_matter_and_compiling_from_outside_works(prepared: qdiff_fx.PreparedUNet) -> None:
    model = qdiff_fx.convert(prepared, backend="x86")
    inputs = sketch_inputs()
    wanted = model(*inputs)
    counters.clear()
    compiled = torch.compile(model)
    assert signal_to_noise(wanted, compiled(*inputs)) > 30.0


@pytest.mark.slow
def test_freezing_leaves_results_as_they_are(prepared: qdiff_fx.PreparedUNet) -> None:
    """The packed weights become constants of the compiled code; set globally, as only that reaches dynamo."""
    model = qdiff_fx.convert(prepared, backend="x86")
    with torch.no_grad(), inductor.patch(freezing=True):
        model.compile()
        inputs = sketch_inputs()
        result, code = run_and_get_code(model, *inputs)
        other = torch.randn(3, 2, 8, 16), torch.linspace(1.0, 999.0, 3)
        results = [result, model(*other)]
    assert "_frozen_param" in "".join(code)
    plain = qdiff_fx.convert(prepared, backend="x86")
    for call, seen in zip((inputs, other), results, strict=True):
        # Equal, unless a frozen float32 convolution sums in another order, which can move a later code by a step: far
        # less than rounding itself, 25 dB here.
        assert signal_to_noise(plain(*call), seen) > 40.0
    assert not counters["graph_break"]


class _Normalized(nn.Module):
    """What a ResNet block does before a convolution, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        hidden = self.stem(sample)
        hidden = hidden + self.first(nn.functional.silu(self.norm(hidden)))
        hidden = hidden + self.second(nn.functional.silu(self.norm(hidden)))
        return self.head(hidden)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizing_is_fused_into_normalization_and_activation(dtype: torch.dtype) -> None:
    module = _Normalized().eval()
    example = (torch.randn(2, 2, 8, 8),)
    prepared = qdiff_fx.prepare(module, qdiff_fx.QDiffConfig.preset("w8a8"), example_inputs=example)
    prepared(*example)
    model = qdiff_fx.convert(prepared, backend="x86", dtype=dtype).compile()
    with torch.no_grad():
        _, (code,) = run_and_get_code(model, torch.randn(2, 2, 8, 8).to(dtype))
    kernels = [text for text in code.split("async_compile.cpp_pybinding") if "convert<uint8_t" in text]
    # Two convolutions, two kernels that write codes, each with its SiLU inside: no quantize step of its own.
    assert len(kernels) == 2
    assert all("exp()" in kernel for kernel in kernels)


class _OneChannel(nn.Module):
    """A stem of one input channel, whose layout only strides can tell, and what reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1)
        self.norm = nn.GroupNorm(8, 24)
        self.conv = nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Conv2d(24, 1, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        hidden = self.stem(sample)
        return self.head(hidden + self.conv(nn.functional.silu(self.norm(hidden))))


@pytest.mark.usefixtures("unchecked_shapes")
def test_norms_reduce_whole_vectors_and_nothing_is_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _OneChannel().eval()
    example = (torch.randn(2, 1, 16, 16),)
    prepared = qdiff_fx.prepare(module, qdiff_fx.QDiffConfig.preset("w8a8"), example_inputs=example)
    prepared(*example)
    model = qdiff_fx.convert(prepared, backend="x86", dtype=torch.bfloat16)
    eager = copy.deepcopy(model)
    model.compile()
    sample = torch.randn(2, 1, 16, 16).to(torch.bfloat16)
    with torch.no_grad():
        result, (code,) = run_and_get_code(model, sample)
        assert signal_to_noise(eager(sample).float(), result.float()) > 30.0
    # Three channels a group: inductor's own reduction has 3 of 16 lanes at work, in Welford's updates.
    assert "Welford" not in code
    # A stem that wrote channels first would make every reader transpose it.
    assert "transpose_mxn" not in code
    monkeypatch.setattr(x86_norms, "group_norm_by_channel", nn.functional.group_norm)
    with torch.no_grad():
        _, (code,) = run_and_get_code(eager.compile(), sample)
    assert "Welford" in code, "inductor reduces group norms otherwise now: look again whether ours is still needed"


class _GatedFeedForward(nn.Module):
    """What a transformer block does around its two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 1)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(32, 16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, sample: Tensor) -> Tensor:
        image = self.stem(sample)
        tokens = image.flatten(2).transpose(1, 2)
        hidden, gate = self.up(self.norm(tokens)).chunk(2, dim=-1)
        tokens = tokens + self.down(hidden * nn.functional.gelu(gate))
        return self.head(tokens.transpose(1, 2).reshape(image.shape))


@pytest.mark.usefixtures("unchecked_shapes")
def test_quantizing_is_fused_into_layer_norm_and_geglu() -> None:
    module = _GatedFeedForward().eval()
    example = (torch.randn(2, 2, 8, 8),)
    prepared = qdiff_fx.prepare(module, qdiff_fx.QDiffConfig.preset("w8a8"), example_inputs=example)
    prepared(*example)
    model = qdiff_fx.convert(prepared, backend="x86", dtype=torch.bfloat16).compile()
    with torch.no_grad():
        _, (code,) = run_and_get_code(model, torch.randn(2, 2, 8, 8).to(torch.bfloat16))
    # Kernels are named after the operators in them.
    texts = re.findall(r"(cpp_fused_\w+) = async_compile\.cpp_pybinding\((.*?)\'\'\'\)", code, re.DOTALL)
    kernels = [name for name, text in texts if "'uint8_t*'" in text]
    # Two linears, two kernels that write codes: one normalises, one is the gate.
    assert len(kernels) == 2, kernels
    assert ["layer_norm" in name for name in kernels] == [True, False], kernels
    assert ["gelu" in name for name in kernels] == [False, True], kernels


@pytest.mark.slow
@pytest.mark.parametrize("load", [load_unconditional, load_conditional], ids=["fashion", "fashion-conditional"])
@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_bundled_models_keep_the_quality_of_the_reference(load: Any, preset: str) -> None:
    pipe = load()
    context = {"encoder_hidden_states": pipe.context[:4].float()} if load is load_conditional else {}
    calls = [
        {"sample": torch.randn(4, 1, 28, 28), "timestep": torch.full((4,), level), **context}
        for level in (20.0, 500.0, 980.0)
    ]
    prepared = qdiff_fx.prepare(pipe.unet, qdiff_fx.QDiffConfig.preset(preset))
    with torch.no_grad():
        full = torch.cat([pipe.unet(**call).sample for call in calls])
        for call in calls:
            prepared(**call)
    quality = {}
    for name, options in {
        "reference": {"backend": "reference"},
        "strict": {"backend": "x86", "strict": True},
        "bfloat16": {"backend": "x86", "dtype": torch.bfloat16},
    }.items():
        model = qdiff_fx.convert(prepared, **options)
        narrow = [
            {key: value.to(model.dtype) if key != "timestep" else value for key, value in call.items()}
            for call in calls
        ]
        with torch.no_grad():
            seen = torch.cat([model(**call).sample.float() for call in narrow])
        quality[name] = signal_to_noise(full, seen)
    assert abs(quality["strict"] - quality["reference"]) < 0.5, quality
    assert quality["bfloat16"] > quality["reference"] - 3.0, quality


def test_context_sizes_are_dynamic_too(preparer: Any) -> None:
    torch.manual_seed(0)
    unet = conditional_unet()
    model = qdiff_fx.convert(observed(unet, preparer, "w8a8"), backend="x86")
    args, kwargs = calls_of(unet)[0]
    sample, timestep, context = args
    longer = torch.cat([context, context], dim=1)
    with torch.no_grad():
        full = unet(sample, timestep, longer).sample
    assert signal_to_noise(full, model(sample, timestep, longer, **kwargs).sample) > 25.0


@pytest.mark.usefixtures("unchecked_shapes")
def test_channel_factors_add_no_kernel() -> None:
    """A vector of steps is fused where a scalar is: factors are free at run time."""
    module, example = _Normalized().eval(), (torch.randn(2, 2, 8, 8),)
    counts = {}
    for factors in (False, True):
        config = qdiff_fx.QDiffConfig.preset("w8a8", equalize=False)
        prepared = qdiff_fx.prepare(module, config, example_inputs=example)
        prepared(*example)
        fit_activations(prepared.graph_module)
        fit_weights(prepared.graph_module)
        if factors:
            assert give_random_factors(prepared.graph_module) > 0
        model = qdiff_fx.convert(prepared, backend="x86").compile()
        with torch.no_grad():
            _, (code,) = run_and_get_code(model, *example)
        counts[factors] = code.count("async_compile.cpp_pybinding")
    assert counts[True] == counts[False] > 0
