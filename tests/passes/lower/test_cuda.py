"""Models lowered to cuda: one kernel a layer, steps fused into it, the same codes and quality as the reference's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qdiff_fx
from architectures import abstract_plan
from fake_gpu import fake_gpu
from qdiff_fx.errors import NonFiniteError
from qdiff_fx.graph.edit import get_tensor, set_tensor
from qdiff_fx.graph.meta import MERGED
from qdiff_fx.graph.propagate import size_hint
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.graph.tokens import set_device
from qdiff_fx.lowering import LoweringReport, lower, offload
from subjects import Preparer, signal_to_noise, sketch_inputs

aten = torch.ops.aten
qdiff = torch.ops.qdiff


@pytest.fixture(scope="module")
def prepared(sketch: nn.Module, preparer: Preparer) -> qdiff_fx.PreparedUNet:
    return preparer.fitted(sketch, "w4a8")


@pytest.fixture(scope="module")
def model(prepared: qdiff_fx.PreparedUNet) -> qdiff_fx.QuantizedUNet:
    return qdiff_fx.convert(prepared, backend="cuda", strict=True)


def targets(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]


def count(graph_module: fx.GraphModule, prefix: str) -> int:
    return sum(target.startswith(prefix) for target in targets(graph_module))


def test_every_layer_and_attention_has_one_kernel(model: qdiff_fx.QuantizedUNet) -> None:
    integer = count(model.plan, "qdiff.conv2d") + count(model.plan, "qdiff.linear")
    assert integer > 0
    assert count(model.lowered, "qdiff.cuda_conv2d") + count(model.lowered, "qdiff.cuda_linear") == integer
    assert count(model.lowered, "qdiff.cuda_attention") == count(model.plan, "qdiff.attention") == 1
    assert {item for item in targets(model.lowered) if item.startswith("qdiff")} <= {
        "qdiff.cuda_conv2d.default",
        "qdiff.cuda_linear.default",
        "qdiff.cuda_attention.default",
    }


def test_codes_are_made_signed_without_a_detour(model: qdiff_fx.QuantizedUNet) -> None:
    assert not count(model.lowered, "aten.bitwise_xor")


def test_quality_is_that_of_the_reference(sketch: nn.Module, prepared: qdiff_fx.PreparedUNet) -> None:
    models = {
        "reference": qdiff_fx.convert(prepared, backend="reference"),
        "cuda": qdiff_fx.convert(prepared, backend="cuda", strict=True),
        "bfloat16": qdiff_fx.convert(prepared, backend="cuda", dtype=torch.bfloat16),
    }
    sample, timestep = sketch_inputs(8)
    with torch.no_grad():
        full = sketch(sample, timestep)
        quality = {
            name: signal_to_noise(full, model(sample.to(model.dtype), timestep).float())
            for name, model in models.items()
        }
    # The bounds of DESIGN.md's integer semantics: one last bit of the carrier moves later codes.
    assert abs(quality["cuda"] - quality["reference"]) < 0.5
    assert quality["bfloat16"] > quality["reference"] - 3.0


def test_attention_runs_on_integers_only_where_it_is_asked_for_or_wins(prepared: qdiff_fx.PreparedUNet) -> None:
    model = qdiff_fx.convert(prepared, backend="cuda")
    rows = [row for row in model.lowering_report().rows if row.fallback]
    assert len(rows) == 1 and rows[0].kernel == "aten.scaled_dot_product_attention"
    assert "predicted" in rows[0].fallback and not rows[0].simulated


def test_the_plan_is_left_as_it_was(prepared: qdiff_fx.PreparedUNet, model: qdiff_fx.QuantizedUNet) -> None:
    reference = qdiff_fx.convert(prepared, backend="reference")
    assert model.plan.code == reference.plan.code
    assert set(model.state_dict()) == set(reference.state_dict())


class Followed(nn.Module):
    """Every step that a kernel can take over, and neighbours that it must not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.embed = nn.Linear(4, 16)
        self.project = nn.Linear(16, 8)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.read_twice = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, sample: Tensor, condition: Tensor) -> Tensor:
        x = self.stem(sample)
        vector = self.project(nn.functional.silu(self.embed(condition)))
        h = self.first(x) + vector[:, :, None, None]
        h = nn.functional.silu(h)
        x = x + self.second(h)
        x = self.left(x) + self.right(x)
        h = self.read_twice(x)
        return self.head(h + h.mean())


@pytest.fixture(scope="module")
def followed() -> qdiff_fx.QuantizedUNet:
    torch.manual_seed(0)
    module = Followed().eval()
    inputs = torch.randn(2, 2, 6, 6), torch.randn(2, 4)
    prepared = qdiff_fx.prepare(module, qdiff_fx.QDiffConfig.preset("w8a8"), example_inputs=inputs)
    prepared(*inputs)
    return qdiff_fx.convert(prepared, backend="cuda")


def test_what_follows_a_layer_is_fused_into_it(followed: qdiff_fx.QuantizedUNet) -> None:
    steps = {row.layer: row.kernel.split(" stages")[-1] for row in followed.lowering_report().rows}
    assert steps["embed"] == " + silu + requantize"
    assert steps["first"] == " + embedding + silu + requantize"
    assert steps["second"] == " + residual + requantize"
    # Their sum has one reader: the quantize step of `read_twice`.
    assert sorted((steps["left"], steps["right"])) == ["", " + residual + requantize"]
    assert steps["read_twice"] == "", "its result is read twice"
    inputs = torch.randn(2, 2, 6, 6), torch.randn(2, 4)
    (wanted,) = followed.plan(*followed.signature.flatten(inputs, {}))
    # Rounding to the carrier happens elsewhere, a few codes move; 8 bits hold about 40 dB.
    assert signal_to_noise(wanted, followed(*inputs)) > 30.0


def test_a_second_run_of_the_passes_changes_nothing(followed: qdiff_fx.QuantizedUNet) -> None:
    from qdiff_fx.config import QDiffConfig
    from qdiff_fx.passes.base import PassContext, run_passes
    from qdiff_fx.passes.lower import LOWER

    code = followed.lowered.code
    context = PassContext(config=QDiffConfig(), signature=followed.signature)
    results = run_passes(LOWER["cuda"], followed.lowered, context)
    assert not any(result.modified for result in results) and followed.lowered.code == code


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_changed_batch_and_size_compile_nothing_anew(model: qdiff_fx.QuantizedUNet) -> None:
    compiled = copy.deepcopy(model).compile(backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for batch, height, width in [(2, 8, 8), (3, 8, 16)]:
            inputs = torch.randn(batch, 2, height, width), torch.linspace(1.0, 999.0, batch)
            assert signal_to_noise(model(*inputs), compiled(*inputs)) > 30.0


def test_the_guard_names_the_first_layer_that_overflows(model: qdiff_fx.QuantizedUNet) -> None:
    broken = copy.deepcopy(model)
    sample, timestep = sketch_inputs()
    node = next(node for node in broken.plan.graph.nodes if str(node.target) == "qdiff.conv2d.default")
    get_tensor(broken.plan, node.args[5].target).data.fill_(torch.inf)  # its bias
    broken = copy.deepcopy(broken)  # lowered again
    assert torch.isfinite(broken(sample, timestep)).all(), "codes swallow it"
    with pytest.raises(NonFiniteError, match=r"wide \(node \w+\) is the first to make NaN or infinity"):
        broken.check_finite()(sample, timestep)
    whole = copy.deepcopy(model).check_finite()
    assert torch.equal(whole(sample, timestep), model(sample, timestep))


def test_what_only_the_plan_holds_leaves_the_device(prepared: qdiff_fx.PreparedUNet) -> None:
    model = copy.deepcopy(qdiff_fx.convert(copy.deepcopy(prepared), backend="cuda"))
    inputs = sketch_inputs()
    wanted = model(*inputs)
    before = {name: tensor.data_ptr() for name, tensor in model.plan.state_dict().items()}
    offload(model.plan, model.lowered, torch.zeros_like)
    moved = [name for name, tensor in model.plan.state_dict().items() if tensor.data_ptr() != before[name]]
    assert any("packed" in name for name in moved) and len(moved) < len(before)
    assert torch.equal(model(*inputs), wanted)


# --------------------------------------------------------------- graphs of public architectures, without weights


class Launches(TorchDispatchMode):
    """Keeps the names of our operators as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("qdiff."):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class ByNode(fx.Interpreter):
    """Runs a graph and keeps what each of its nodes launched."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.launched: dict[str, list[str]] = {}

    def run_node(self, n: fx.Node) -> Any:
        with Launches() as launches:
            result = super().run_node(n)
        self.launched[n.name] = launches.names
        return result


def sizes(lowered: fx.GraphModule) -> Iterator[tuple[str, list[int], torch.dtype]]:
    for node in lowered.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            yield node.name, [size_hint(size) for size in value.shape], value.dtype


def traced_on_fake_gpu(lowered: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, list[str]]]:
    """The whole graph as make_fx records it on fake tensors of a GPU, and what each node of `lowered` launched.

    One graph or an error: a value that decides (`.item()`, a data-dependent shape) cannot be traced on fake tensors;
    in a captured CUDA graph it would wait for the GPU.
    """
    set_device(lowered.graph, torch.device("cuda"))
    lowered.recompile()
    with fake_gpu():
        for node in lowered.graph.nodes:
            if node.op == "get_attr":
                tensor = get_tensor(lowered, node.target)
                if not tensor.is_cuda:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
                    set_tensor(lowered, str(node.target), fake, persistent=False)
        inputs = [torch.empty(shape, dtype=dtype, device="cuda") for _, shape, dtype in sizes(lowered)]
        run = ByNode(lowered)
        with torch.no_grad():
            traced = make_fx(lambda *values: run.run(*values))(*inputs)
    return traced, run.launched


def compiled_graphs(lowered: fx.GraphModule) -> int:
    """How many graphs dynamo makes of it, fullgraph."""
    graphs = []

    def keep(graph_module: fx.GraphModule, _inputs: list[Tensor]) -> fx.GraphModule:
        graphs.append(graph_module)
        return graph_module

    inputs = [torch.empty(shape, dtype=dtype, device="meta") for _, shape, dtype in sizes(lowered)]
    with torch.no_grad():
        torch.compile(lowered, fullgraph=True, backend=keep)(*inputs)
    return len(graphs)


def merged_call(lowered: fx.GraphModule, name: str) -> str | None:
    """The call that a layer is a slice of, None if it is one of its own."""
    (node,) = (item for item in lowered.graph.nodes if item.name == name)
    return node.args[0].name if MERGED.get(node) else None


def check_architecture(plan: fx.GraphModule, signature: CallSignature, shape: tuple[int, ...]) -> LoweringReport:
    lowered, report = lower(plan, "cuda", signature)
    layers = count(plan, "qdiff.conv2d") + count(plan, "qdiff.linear")
    kernels = count(lowered, "qdiff.cuda_")
    calls = [merged_call(lowered, row.node) or row.node for row in report.rows]  # of merged layers, the one of all
    kept = {
        call
        for call, row in zip(calls, report.rows, strict=True)
        if "predicted" in row.fallback and row.kernel.startswith("aten.")
    }
    attentions = count(plan, "qdiff.attention")
    assert kernels + len(kept) == layers + attentions - (len(calls) - len(set(calls)))
    assert not count(lowered, "qdiff.conv2d") + count(lowered, "qdiff.linear") + count(lowered, "qdiff.quantize")
    assert not count(lowered, "aten.bitwise_xor")
    traced, launched = traced_on_fake_gpu(lowered)
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    result = tree_leaves(output.args)[0].meta["val"]
    assert result.device.type == "cuda" and result.dtype == torch.float16 and tuple(result.shape) == shape
    assert count(traced, "qdiff.") == count(traced, "qdiff.cuda_") == kernels
    assert traced_devices(traced) == {"cuda"}
    # A layer or attention on integers is one kernel, epilogue included; any other node launches none of ours.
    for call, row in zip(calls, report.rows, strict=True):
        assert len(launched[call]) == (not row.kernel.startswith("aten.")), row
    assert sum(len(names) for names in launched.values()) == kernels
    return report


def traced_devices(traced: fx.GraphModule) -> set[str]:
    """Kinds of devices that results of a traced graph are on."""
    values = (node.meta.get("val") for node in traced.graph.nodes if node.op in ("call_function", "placeholder"))
    return {value.device.type for value in values if isinstance(value, Tensor)}


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_small_conditional_unet_traces_on_a_fake_gpu() -> None:
    report = check_architecture(*abstract_plan("tiny", "w4a8"), (2, 4, 8, 8))
    assert sum("+ residual" in row.kernel for row in report.rows) > 10


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_stable_diffusion_traces_on_a_fake_gpu(preset: str) -> None:
    plan, signature = abstract_plan("sd15", preset)
    report = check_architecture(plan, signature, (2, 4, 64, 64))
    lowered, _ = lower(plan, "cuda", signature)
    assert compiled_graphs(lowered) == 1
    kernels = [row.kernel for row in report.rows]
    # 22 ResNet blocks add their embedding in a kernel and their shortcut in another; so do the 16 feed-forward and the
    # 16 output projections, and 12 of 32 attention projections (the others are predicted to win in the carrier).
    assert sum("+ embedding" in kernel for kernel in kernels) == 22
    assert sum("+ residual" in kernel for kernel in kernels) >= 22 + 12 + 16 + 16
