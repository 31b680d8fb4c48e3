"""Compiled code of a network lowered to x86, in a file: an AOTInductor package without weights.

The package holds machine code and no tensors: it reads those of the lowered network that it is given to. A stamp says
what it fits: this graph with its constants' shapes, this CPU's instruction sets, this version of torch. Another is
refused, before any of the package's code is loaded. A package is native code all the same: whoever can write the file
can run what they like, so load only your own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.calibration.progress import named_steps
from qdiff_fx.errors import BackendError, CheckpointError, InputError
from qdiff_fx.graph.edit import get_tensor, shape_of
from qdiff_fx.graph.propagate import example_inputs
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.kernels import select_backend
from qdiff_fx.kernels.machine import instruction_sets, processor_digest
from qdiff_fx.kernels.x86_native import find_compiler, kernel_digest, native_kernels
from qdiff_fx.safe_io import replacing

SUFFIX = ".pt2"
_STAMP = "qdiff_fx"
_METADATA = ".wrapper_metadata.json"
_MOST_METADATA = 2**20
_AGAIN = "write it again with package() on this machine"


def require_packages() -> None:
    """Raise BackendError where packages cannot be made: oneDNN packs weights into tensors that no file can refer to."""
    select_backend("x86", "cpu")
    try:
        find_compiler()
    except (OSError, ValueError) as error:
        raise BackendError(f"nothing can be compiled here: {error}; install one, or name it in CXX") from error
    if native_kernels() is None:
        raise BackendError(
            "nothing can be compiled ahead of time here: that takes AVX512-VNNI and no AMX, or AVX2 and no VNNI; this "
            f"CPU has {' '.join(instruction_sets()) or 'none of them'}; use compile()"
        )


def write_package(
    lowered: fx.GraphModule, signature: CallSignature, path: Path, *, progress: bool | None = False
) -> None:
    """Compile `lowered` for every batch and size and write the code to `path`, which ends in .pt2, atomically.

    Raises: BackendError where `require_packages` does, and for dimensions that the exporter makes constant; DiskError.
    """
    require_packages()
    with named_steps("compile ahead of time", total=2, progress=progress) as begin, torch.no_grad():
        begin("export")
        example = example_inputs(lowered, least=2)  # the exporter makes constants of ones
        program = torch.export.export(lowered, example, dynamic_shapes=_dynamic(signature))
        _require_dynamic(program, signature)
        begin("compile")
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "aot_inductor.metadata": {_STAMP: json.dumps(stamp(lowered))},
                "aot_inductor.package_constants_in_so": False,
                "cpp.dynamic_threads": True,
            }
            made = str(Path(folder) / f"package{SUFFIX}")
            torch._inductor.aoti_compile_and_package(program, package_path=made, inductor_configs=settings)
            with replacing(path) as partial:
                shutil.copyfile(made, partial)


def read_package(lowered: fx.GraphModule, path: Path) -> Callable[..., Any]:
    """The code at `path` as a function of flat inputs, bound to the tensors of `lowered`.

    Raises: CheckpointError if the file is no package of ours; BackendError if it fits another network or machine.
    """
    written, wanted = _read_stamp(path), stamp(lowered)
    for key, value in wanted.items():
        if written.get(key) != value:
            raise BackendError(f"{path}: compiled for {key} {written.get(key)!r:.80}, here it is {value!r}; {_AGAIN}")
    code = torch._inductor.aoti_load_package(str(path))
    held = _constants(lowered)
    code.load_constants(
        {name: held[name] for name in code.get_constant_fqns()}, check_full_update=True, user_managed=True
    )
    dtypes = [node.meta["val"].dtype for node in _placeholders(lowered)]

    def call(*inputs: Tensor) -> Any:
        for value in inputs:
            if value.device.type != "cpu":
                raise InputError(f"an input is on {value.device}, the package runs on cpu; use .to('cpu')")
        # The code looks at no dtypes and strides: it is compiled for those of the graph, and for plain strides.
        given = zip(inputs, dtypes, strict=True)
        return code.loader.boxed_run([value.detach().to(dtype).contiguous() for value, dtype in given])

    weakref.finalize(call, _let_go, tuple(held.values()))
    return call


def _let_go(tensors: tuple[Tensor, ...]) -> None:
    """Empty these names of the network's tensors, not the tensors: AOTInductor never frees what it was lent."""
    for tensor in tensors:
        tensor.set_()  # type: ignore[call-overload]


def _placeholders(lowered: fx.GraphModule) -> list[fx.Node]:
    return [node for node in lowered.graph.nodes if node.op == "placeholder"]


def _constants(lowered: fx.GraphModule) -> dict[str, Tensor]:
    names = dict.fromkeys(str(node.target) for node in lowered.graph.nodes if node.op == "get_attr")
    return {name: get_tensor(lowered, name).detach() for name in names}


def stamp(lowered: fx.GraphModule) -> dict[str, str]:
    """What a package must agree on; literals, such as zero points, are in the graph's code."""
    inputs = []
    for node in _placeholders(lowered):
        sizes = [size if isinstance(size, int) else None for size in shape_of(node) or ()]
        inputs.append(f"{node.name} {node.meta['val'].dtype} {sizes}")
    constants = [
        f"{name} {tensor.dtype} {list(tensor.shape)} {list(tensor.stride())}"
        for name, tensor in _constants(lowered).items()
    ]
    text = "\n".join([lowered.code, *inputs, *constants])
    return {
        "package format": "1",
        "torch": str(torch.__version__),
        "instruction sets": " ".join(instruction_sets()),
        "processor": processor_digest(),
        "kernels": kernel_digest(),
        "network": hashlib.sha256(text.encode()).hexdigest(),
    }


def _read_stamp(path: Path) -> Mapping[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            found = [item for item in archive.infolist() if item.filename.endswith(_METADATA)]
            if len(found) != 1 or found[0].file_size > _MOST_METADATA:
                raise CheckpointError(f"{path}: no compiled package of qdiff_fx; {_AGAIN}")
            content = json.loads(json.loads(archive.read(found[0]))[_STAMP])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no compiled package of qdiff_fx ({error}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: no compiled package of qdiff_fx; {_AGAIN}")
    return content


def _dynamic(signature: CallSignature) -> tuple[dict[int, Any], ...]:
    automatic = torch.export.Dim.AUTO
    return tuple({axis: automatic for axis, size in enumerate(item.shape) if size is None} for item in signature.inputs)


def _require_dynamic(program: torch.export.ExportedProgram, signature: CallSignature) -> None:
    inputs = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    for node, item in zip(nodes, signature.inputs, strict=True):
        for axis, size in enumerate(item.shape):
            if size is None and isinstance(node.meta["val"].shape[axis], int):
                raise BackendError(
                    f"{item.name}: dimension {axis} became the constant {node.meta['val'].shape[axis]} in export; "
                    f"use compile(), which compiles anew where it must"
                )
