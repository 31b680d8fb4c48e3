"""The modules that users hold: PreparedUNet and QuantizedUNet, called like the original."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # diffusers finds loaders by a class's module
from torch import Tensor, fx

from qdiff_fx.ahead_of_time import SUFFIX as PACKAGE_SUFFIX
from qdiff_fx.ahead_of_time import read_package, write_package
from qdiff_fx.autotune import Timings
from qdiff_fx.calibration.report import tell_quality
from qdiff_fx.checkpoint import (
    DEFAULT_SHARD_BYTES,
    StoredModel,
    read_model,
    read_timings,
    write_model,
    write_timings,
)
from qdiff_fx.config import QDiffConfig
from qdiff_fx.errors import BackendError, DiskError, InputError
from qdiff_fx.fake_quantize import NoiseLevel, QuantizerMode, set_mode
from qdiff_fx.graph.finite import FiniteRun
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.graph.tokens import set_device
from qdiff_fx.graph_unet import GraphUNet
from qdiff_fx.kernels import BACKENDS, device_of_map, rival_backends, select_backend, usable_device
from qdiff_fx.kernels.machine import machine_signature
from qdiff_fx.lowering import LoweringReport, check_choices, lower, offload
from qdiff_fx.passes.base import PassResult
from qdiff_fx.passes.carrier import check_carrier, set_carrier
from qdiff_fx.safe_io import write_bytes
from qdiff_fx.step_timing import lower_to_fastest

logger = logging.getLogger(__name__)


def _compiler_options(backend: Any) -> dict[str, Any]:
    """What is left out of compiled code, because the lowered graph is nobody else's and its tensors are never swapped.

    A guard on each of them, and a check of each operand's strides, take milliseconds a call. Compiled code belongs to
    the graph's own code object, so no other model can be given it.
    """
    unguarded: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    return unguarded | ({"size_asserts": False} if backend in (None, "inductor") else {})


def _with_dynamic_sizes(compiled: Callable[..., Any], signature: CallSignature) -> Callable[..., Any]:
    """`compiled`, told of every call which sizes may change, and of no grad mode: a change of it would compile anew."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(*inputs: Tensor) -> Any:
        # Marks are kept on the tensor object: on the caller's own they would bind every other compiled model.
        inputs = tuple(value.clone() if value.is_inference() else value.detach() for value in inputs)
        for item, value in zip(signature.inputs, inputs, strict=True):
            for axis, size in enumerate(item.shape):
                # A dimension of 1 is always a constant to the compiler: batch 1 costs one more compilation.
                if size is None and value.shape[axis] > 1:
                    torch._dynamo.mark_dynamic(value, axis)
        return compiled(*inputs)

    return run


def _numbers(stored: Any) -> dict[str, float]:
    """The positive numbers of a stored table."""
    items = stored.items() if isinstance(stored, Mapping) else ()
    return {str(name): value for name, value in items if isinstance(value, (int, float)) and value > 0}


class PreparedUNet(GraphUNet):
    """A network with observers and fake-quantize modules in its graph.

    Until it is calibrated its forward returns the full-precision result and observes; afterwards it simulates the
    quantized network.
    """

    qdiff_stage = "prepared"
    _other_type = "cast the original before prepare(), or use qdiff_fx.convert(prepared, dtype={})"
    _kept_by = "calibrate(checkpoint_dir=) keeps what it fits, and qdiff_fx.save what convert() returns"

    def __init__(
        self,
        graph_module: fx.GraphModule,
        qdiff_config: QDiffConfig,
        noise_level: NoiseLevel,
        pass_results: tuple[PassResult, ...],
        **shell: Any,
    ) -> None:
        super().__init__(**shell)
        self.graph_module = graph_module
        self.original_class = type(graph_module).__name__
        self.qdiff_config = qdiff_config
        self.noise_level = noise_level
        self.pass_results = pass_results
        self.calibrated = False
        self.calibration: Mapping[str, Any] = {}
        self.eval()

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        names = self.signature.names
        level = inputs[names.index(self.signature.timestep)] if self.signature.timestep in names else None
        self.noise_level.timesteps = level.detach().reshape(-1) if level is not None else None
        return self.graph_module(*inputs)

    def set_mode(self, mode: QuantizerMode) -> Self:
        """Observe, simulate the quantized network, or pass everything through in full precision."""
        set_mode(self.graph_module, mode)
        return self


class QuantizedUNet(GraphUNet):
    """A converted network: packed integer weights, integer activations, lowered to one backend's kernels.

    `plan` is the backend-neutral graph, which is what `save` writes; copies are lowered again from it. `calibration` is
    `CalibrationReport.summary()`, stored with it: `calibration["quality"]["median_db"]` is the output SQNR on held-out
    inputs.
    """

    qdiff_stage = "quantized"
    _other_type = "use qdiff_fx.convert(prepared, dtype={}), or qdiff_fx.load(folder, dtype={})"
    _kept_by = "use qdiff_fx.save(model, folder) and qdiff_fx.load(folder)"
    lowered: fx.GraphModule
    _separate: fx.GraphModule | None

    def __init__(
        self,
        plan: fx.GraphModule,
        qdiff_config: QDiffConfig,
        *,
        backend: str = "auto",
        strict: bool = False,
        autotune: bool = False,
        timings: Mapping[str, Timings] | None = None,
        calibration: Mapping[str, Any] | None = None,
        progress: bool | None = False,
        **shell: Any,
    ) -> None:
        super().__init__(**shell)
        check_choices(strict=strict, autotune=autotune)
        self.autotune, self.timings = autotune, dict(timings or {})
        self.qdiff_config = qdiff_config
        self.plan = plan
        self.original_class = type(plan).__name__
        self.requested_backend, self.strict = backend, strict
        self.calibration = dict(calibration or {})
        self._compiled: Callable[..., Any] | None = None
        self.__dict__["_separate"] = None
        self._placement = super().device
        self.eval()
        self._lower(progress=progress)

    @property
    def device(self) -> torch.device:
        """Where it runs; tensors of the plan that only `save` and another lowering read may lie in main memory."""
        return self._placement

    def _candidates(self, kept: LoweringReport | None) -> tuple[str, ...]:
        """Backends to lower to: one, or those between which a timed step decides."""
        device = self.device.type
        if self.autotune and self.requested_backend == "auto":
            if kept is not None and kept.steps and BACKENDS[kept.backend].unavailable(device) is None:
                return (kept.backend,)
            if rivals := rival_backends(device):
                return rivals
        return (select_backend(self.requested_backend, device).name,)

    def _lower(self, kept: LoweringReport | None = None, *, progress: bool | None = False) -> None:
        """Lower the plan; `kept` is the report of what this is a copy of, whose backend is not chosen anew."""
        names = self._candidates(kept)
        self.plan.to(self.device)
        machine = machine_signature(self.device) if self.autotune else ""
        known = self.timings.get(machine, {}) if self.autotune else None

        def to(name: str) -> tuple[fx.GraphModule, LoweringReport]:
            return lower(self.plan, name, self.signature, strict=self.strict, timings=known, progress=progress)

        if len(names) > 1:
            lowered, report = lower_to_fastest(self.plan, names, to)
        else:
            lowered, report = to(*names)
            if kept is not None and kept.backend == report.backend:
                report = replace(report, steps=kept.steps, refused=kept.refused)
        if report.timings:
            self.timings[machine] = report.timings
        self.backend, self._report = report.backend, report
        # Not a submodule: its packed weights can neither be copied nor saved, and the plan owns all the rest.
        self.__dict__["lowered"] = lowered
        if self.device.type == "cuda":
            offload(self.plan, lowered)
        fallbacks = [row for row in report.rows if row.fallback and not row.simulated]
        if self.strict and fallbacks:
            first = fallbacks[0]
            raise BackendError(
                f"strict=True: {len(fallbacks)} nodes fall back on backend {self.backend!r}, the first is "
                f"{first.layer or first.node}: {first.fallback}; use strict=False to allow it"
            )

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "lowered": None, "_compiled": None, "_separate": None}
        state.pop("_original", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lower(self._report)

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        if self._separate is not None:
            return FiniteRun(self._separate).run(*inputs)
        run = self.lowered if self._compiled is None else self._compiled
        return run(*inputs)

    def compile(self, *, package: str | Path | None = None, **options: Any) -> Self:  # type: ignore[override]
        """Compile in place with dynamic batch, height, width and context length; returns itself.

        Nothing is left to do, and nothing is done, where the backend's own engine compiled the model when it was
        lowered (openvino).

        Args:
          package: a file that `package` wrote; it is loaded in a second, and nothing is compiled. It holds native code:
            load only your own.
          options: of torch.compile; fullgraph is on by default.

        Raises: BackendError for a package of another network, machine or torch; CheckpointError for another file.
        """
        if package is not None:
            self._require_packages()
            if options:
                raise InputError(f"compile(package=) compiles nothing, so it takes no {', '.join(options)}")
            self._compiled = read_package(self.lowered, Path(package))
            return self
        if not BACKENDS[self.backend].traceable:
            return self
        if options.get("mode") is None:
            options["options"] = {**_compiler_options(options.get("backend")), **(options.get("options") or {})}
        self._compiled = _with_dynamic_sizes(
            torch.compile(self.lowered, **{"fullgraph": True, **options}), self.signature
        )
        return self

    def package(self, path: str | Path, *, progress: bool | None = None) -> Self:
        """Compile ahead of time, for all batches and sizes, into the file `path`, and run that code; returns itself.

        The file (AOTInductor's, .pt2) holds code without weights. A model that is loaded later, from the same folder on
        a machine like this one, runs it after `compile(package=path)`. On small networks it is a fifth faster than
        torch.compile, whose guards and argument passing it leaves out.

        Args:
          path: ends in .pt2.
          progress: show a bar; None does so on a terminal.

        Raises: BackendError on another backend than x86, without a C++ compiler, and on CPUs with AMX, where oneDNN
          packs weights into tensors that no file can refer to.
        """
        target = Path(path)
        if target.suffix.lower() != PACKAGE_SUFFIX:
            raise InputError(f"{path}: want a file name that ends in {PACKAGE_SUFFIX}")
        self._require_packages()
        write_package(self.lowered, self.signature, target, progress=progress)
        return self.compile(package=target)

    def _require_packages(self) -> None:
        if self.backend != "x86":
            raise BackendError(f"backend {self.backend!r} has no packages; lower to 'x86'")

    def check_finite(self, enabled: bool = True) -> Self:
        """Raise NonFiniteError, naming the first layer that makes NaN or infinity; returns itself.

        Off by default, and for finding out: it lowers the plan once more, so that every layer's result is seen, leaves
        compiled code aside and waits for the device after each layer.
        """
        self.__dict__["_separate"] = None
        if enabled:
            plan = copy.deepcopy(self.plan).to(self.device)
            self.__dict__["_separate"], _ = lower(plan, self.backend, self.signature, strict=self.strict, separate=True)
        return self

    def lowering_report(self) -> LoweringReport:
        """A row a node: kernel, dtype, bytes, and the reason of any fallback; `str()` of it is a table."""
        return self._report

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        placement = fn(torch.empty(0, device=self.device)).device
        if placement != self.device:
            select_backend(self.requested_backend, placement.type)  # before anything is moved
        super()._apply(fn, recurse)
        if placement != self.device:
            self.__dict__["_separate"] = None
            self._placement = placement
            self._compiled = None
            set_device(self.plan.graph, self.device)
            self.plan.recompile()
            self._lower()
        return self

    def save(
        self,
        folder: str | Path,
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        progress: bool | None = False,
    ) -> None:
        """Write the plan, not what it was lowered to. See `qdiff_fx.save`."""
        model = StoredModel(
            plan=self.plan,
            config=self.qdiff_config,
            signature=self.signature,
            output=self.output,
            model_config=dict(self.config),
            returns_dict=self.returns_dict,
            calibration=self.calibration,
        )
        write_model(model, Path(folder), max_shard_bytes=max_shard_bytes, progress=progress)
        if self.timings:
            write_timings(Path(folder), self.timings)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        backend: str = "auto",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        strict: bool = False,
        autotune: bool = False,
        progress: bool | None = False,
    ) -> Self:
        """The model that `save` wrote. See `qdiff_fx.load`."""
        timings = read_timings(Path(folder)) if autotune else {}
        model = read_model(Path(folder), usable_device(device), progress=progress)
        if dtype is not None and dtype != model.carrier:
            maxima, offsets = (_numbers(model.calibration.get(key)) for key in ("maxima", "offsets"))
            check_carrier(dtype, maxima, offsets, stacklevel=4)  # the caller of qdiff_fx.load
            model = replace(model, signature=set_carrier(model.plan, model.signature, dtype))
        result = cls(
            model.plan,
            model.config,
            backend=backend,
            strict=strict,
            autotune=autotune,
            timings=timings,
            calibration=model.calibration,
            progress=progress,
            signature=model.signature,
            output=model.output,
            model_config=model.model_config,
            returns_dict=model.returns_dict,
        )
        if result.timings != timings:
            try:
                write_timings(Path(folder), result.timings)
            except DiskError as error:
                logger.warning("timings of layers are not kept: %s", error)
        tell_quality(Path(folder), result.calibration, stacklevel=4)  # the caller of qdiff_fx.load
        return result

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        """Write what `save` writes and diffusers' config.json, so that a pipeline's save_pretrained keeps the model."""
        write_bytes(Path(save_directory) / self.config_name, self.to_json_string().encode())
        self.save(save_directory, max_shard_bytes=max_shard_bytes)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        directory: str | Path,
        *,
        backend: str = "auto",
        device: str | torch.device = "cpu",
        device_map: Any = None,
        strict: bool = False,
        autotune: bool = False,
        subfolder: str | None = None,
        **options: Any,
    ) -> Self:
        """The model that `save_pretrained` wrote.

        Args:
          device_map: a device or {"": device}, in the place of `device`; tensors go there one after the other.
          options: what pipelines hand to each of their parts (dtype, variant, ...); a stored model has its own carrier
            type and one set of files, so they have no effect.

        Raises: InputError for a device_map of several parts, and what `qdiff_fx.load` raises.
        """
        place = device if device_map is None else device_of_map(device_map)
        return cls.load(Path(directory, subfolder or ""), backend, device=place, strict=strict, autotune=autotune)
