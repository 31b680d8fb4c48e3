"""Packages: the same results for every batch and size without compiling again, bound to one network and machine."""

from __future__ import annotations

import copy
import gc
import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import qdiff_fx
from qdiff_fx import ahead_of_time
from qdiff_fx.errors import BackendError, CheckpointError, InputError
from qdiff_fx.kernels import BACKENDS
from qdiff_fx.kernels.x86_native import native_kernels
from subjects import signal_to_noise, sketch_inputs

_REASON = BACKENDS["x86"].unavailable("cpu") or (None if native_kernels() is not None else "no kernels of our own here")
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


def inputs(batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(batch)
    return torch.randn(batch, 2, height, width), torch.linspace(1.0, 900.0, batch)


@pytest.fixture(scope="module")
def model(sketch: nn.Module) -> qdiff_fx.QuantizedUNet:
    prepared = qdiff_fx.prepare(sketch, qdiff_fx.QDiffConfig.preset("w4a8"), example_inputs=sketch_inputs())
    prepared(*sketch_inputs())
    return qdiff_fx.convert(prepared, backend="x86")


@pytest.fixture(scope="module")
def package(model: qdiff_fx.QuantizedUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "code.pt2"
    copy.deepcopy(model).package(path, progress=False)
    return path


def test_every_batch_and_size_runs_the_same_code(model: qdiff_fx.QuantizedUNet, package: Path, tmp_path: Path) -> None:
    qdiff_fx.save(model, tmp_path / "stored")
    loaded = qdiff_fx.load(tmp_path / "stored", "x86").compile(package=package)
    for batch, height, width in ((2, 8, 8), (1, 8, 8), (3, 8, 16), (5, 16, 12)):
        sample, timestep = inputs(batch, height, width)
        wanted, result = model(sample, timestep), loaded(sample, timestep)
        assert result.shape == wanted.shape and result.dtype == wanted.dtype
        # Fused kernels round the carrier elsewhere; a few codes move. 8 bits hold about 40 dB.
        assert signal_to_noise(wanted, result) > 30.0
    flipped = inputs(2, 8, 8)[0].contiguous(memory_format=torch.channels_last)
    assert torch.equal(loaded(flipped, timestep[:2]), loaded(flipped.contiguous(), timestep[:2]))


def test_the_package_holds_no_weights_and_a_copy_lets_go_of_it(
    model: qdiff_fx.QuantizedUNet, package: Path, sketch: nn.Module
) -> None:
    packaged = copy.deepcopy(model).compile(package=package)
    sample, timestep = inputs(2, 8, 8)
    before = packaged(sample, timestep)
    for tensor in packaged.lowered.buffers():
        tensor.zero_()
    assert not torch.equal(packaged(sample, timestep), before)
    assert copy.deepcopy(packaged)._compiled is None


def test_inputs_have_the_types_that_the_code_was_compiled_for(model: qdiff_fx.QuantizedUNet, package: Path) -> None:
    """Code looks at no dtypes; the flat call casts floating types only."""
    code = ahead_of_time.read_package(model.lowered, package)
    sample, timestep = inputs(2, 8, 8)
    whole = timestep.round()
    assert torch.equal(code(sample, whole.to(torch.int64))[0], code(sample, whole)[0])
    with pytest.raises(InputError, match="runs on cpu"):
        code(sample.to("meta"), timestep)


def test_the_tensors_are_let_go_with_the_code(model: qdiff_fx.QuantizedUNet, package: Path) -> None:
    packaged = copy.deepcopy(model).compile(package=package)
    tensor = next(iter(packaged.lowered.buffers()))
    lent = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    packaged._compiled = None
    gc.collect()
    assert torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) < lent
    assert packaged(*inputs(2, 8, 8)).isfinite().all()


@pytest.mark.usefixtures("unchecked_shapes")
def test_the_last_compilation_counts(model: qdiff_fx.QuantizedUNet, package: Path) -> None:
    packaged = copy.deepcopy(model).compile(package=package)
    code = packaged._compiled
    assert code is not None and packaged.compile()._compiled not in (None, code)
    with pytest.raises(InputError, match="takes no mode"):
        packaged.compile(package=package, mode="max-autotune")


def test_another_network_machine_or_torch_is_refused(
    model: qdiff_fx.QuantizedUNet, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = copy.deepcopy(model.plan)
    node = next(node for node in plan.graph.nodes if str(node.target) == "qdiff.conv2d.default")
    node.args = (*node.args[:7], node.args[7] + 1, *node.args[8:])  # a zero point
    plan.recompile()
    shell = {"signature": model.signature, "output": model.output, "model_config": {}, "returns_dict": False}
    other = qdiff_fx.QuantizedUNet(plan, model.qdiff_config, backend="x86", **shell)
    with pytest.raises(BackendError, match="compiled for network"):
        other.compile(package=package)
    for module, name, value, told in (
        (
            ahead_of_time,
            "instruction_sets",
            lambda: ["avx512_vnni", "amx_int8"],
            r"instruction sets .* here it is 'avx512",
        ),
        (ahead_of_time, "processor_digest", lambda: "another", "processor"),
        (ahead_of_time, "kernel_digest", lambda: "another", "kernels"),
        (torch, "__version__", "9.9", "torch"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            with pytest.raises(BackendError, match=f"compiled for {told}"):
                model.compile(package=package)
    other = copy.deepcopy(model)
    sample = next(node for node in other.lowered.graph.nodes if node.op == "placeholder")
    sample.meta["val"] = sample.meta["val"].to(torch.float64)
    with pytest.raises(BackendError, match="compiled for network"):
        other.compile(package=package)


def test_other_files_are_refused_before_they_are_loaded(
    model: qdiff_fx.QuantizedUNet, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(path: str) -> None:
        raise AssertionError(f"{path} was loaded")

    monkeypatch.setattr(torch._inductor, "aoti_load_package", never)
    (tmp_path / "text.pt2").write_text("not a package")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("readme", "nothing")
    with zipfile.ZipFile(tmp_path / "foreign.pt2", "w") as archive:
        archive.writestr("a.wrapper_metadata.json", json.dumps({"AOTI_MACHINE": "x86_64"}))
    with zipfile.ZipFile(tmp_path / "list.pt2", "w") as archive:
        archive.writestr("a.wrapper_metadata.json", json.dumps({"qdiff_fx": "[]"}))
    with zipfile.ZipFile(package) as archive, zipfile.ZipFile(tmp_path / "edited.pt2", "w") as edited:
        for item in archive.infolist():
            content = archive.read(item)
            if item.filename.endswith(".wrapper_metadata.json"):
                content = json.dumps({"qdiff_fx": json.dumps({"package format": "2"})}).encode()
            edited.writestr(item, content)
    for name, error in (
        ("missing", CheckpointError),
        ("text", CheckpointError),
        ("other", CheckpointError),
        ("foreign", CheckpointError),
        ("list", CheckpointError),
        ("edited", BackendError),
    ):
        with pytest.raises(error, match=f"{name}.pt2"):
            copy.deepcopy(model).compile(package=tmp_path / f"{name}.pt2")


def test_a_dimension_that_export_makes_constant_is_refused(
    model: qdiff_fx.QuantizedUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = tuple({} for _ in model.signature.inputs)
    monkeypatch.setattr(ahead_of_time, "_dynamic", lambda signature: static)
    with pytest.raises(BackendError, match="became the constant"):
        copy.deepcopy(model).package(tmp_path / "code.pt2", progress=False)
    assert not list(tmp_path.iterdir())


def test_names_backends_and_machines_without_packages(
    model: qdiff_fx.QuantizedUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"ends in \.pt2"):
        model.package(tmp_path / "code.so")
    qdiff_fx.save(model, tmp_path / "stored")
    with pytest.raises(BackendError, match="'reference' has no packages"):
        qdiff_fx.load(tmp_path / "stored", "reference").package(tmp_path / "code.pt2")
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        with pytest.raises(BackendError, match="no-such-compiler is not in PATH"):
            model.package(tmp_path / "code.pt2")
    monkeypatch.setattr(ahead_of_time, "native_kernels", lambda: None)
    with pytest.raises(BackendError, match="no AMX"):
        model.package(tmp_path / "code.pt2")
