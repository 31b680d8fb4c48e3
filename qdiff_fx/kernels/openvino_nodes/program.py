"""A compiled OpenVINO model as a module of tensors, and what its layers run on."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openvino as ov
import torch
from torch import Tensor, nn

_PRECISIONS = {torch.bfloat16: "bf16"}
"""What the plugin computes non-integers in, by carrier type; everything else in f32, float16 too: most CPUs lack it."""


@dataclass(frozen=True, kw_only=True)
class RunsOn:
    """Where the plugin put one operator: its kind of kernel, the precision of its operands, the implementation."""

    kind: str
    precision: str
    implementation: str

    @property
    def is_integer(self) -> bool:
        """Whether the operands are integers."""
        return self.precision in ("u8", "i8")


class Program(nn.Module):
    """A compiled model called with tensors; never traced, copied or saved: it is compiled anew from the plan.

    Args:
      model: an `openvino.Model`.
      outputs: one tensor a result, for its dtype and memory layout.
      sequence: whether the graph returned a sequence.
      carrier: what non-integers are computed in, where the CPU can.
      threads: that a call runs on.
    """

    def __init__(
        self, model: Any, outputs: Sequence[Tensor], *, sequence: bool, carrier: torch.dtype, threads: int
    ) -> None:
        super().__init__()
        self._outputs = [(item.dtype, _is_channels_last(item)) for item in outputs]
        self._sequence = sequence
        options = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS.get(carrier, "f32"),
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            # Inputs that the plan keeps in the carrier type are not to be quantized on the way.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        self.compiled = ov.Core().compile_model(model, "CPU", options)
        self._request = self.compiled.create_infer_request()
        self._lock = threading.Lock()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *inputs: Tensor) -> Any:
        arrays = [_array(item) for item in inputs]
        with self._lock:
            found = self._request.infer(arrays, share_inputs=True)
            results = [torch.from_numpy(found[index]) for index in range(len(self._outputs))]
        shaped = [
            item.to(dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            for item, (dtype, last) in zip(results, self._outputs, strict=True)
        ]
        return tuple(shaped) if self._sequence else shaped[0]

    def placement(self) -> Mapping[str, RunsOn]:
        """What every operator of the model that still has a kernel of its own runs on, by its name."""
        found: dict[str, RunsOn] = {}
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            info = {key: str(value.astype(str)) for key, value in node.get_rt_info().items() if key in _KEYS}
            runs = RunsOn(
                kind=info["layerType"],
                precision=info["runtimePrecision"].lower(),
                implementation=info["primitiveType"].lower(),
            )
            for name in info["originalLayersNames"].split(","):
                # A layer that was made integer is "name/DequantizationMultiply" to the plugin.
                if runs.kind in _KERNELS:
                    found[name.partition("/")[0]] = runs
        return found


_KEYS = ("layerType", "runtimePrecision", "primitiveType", "originalLayersNames")
_KERNELS = ("Convolution", "FullyConnected", "MatMul", "ScaledDotProductAttention", "Subgraph")


def _is_channels_last(value: Tensor) -> bool:
    # By strides: an empty tensor is contiguous in every format.
    return value.ndim == 4 and bool(value.stride(1) == 1)


def _array(value: Tensor) -> Any:
    value = value.detach()
    if value.dtype.is_floating_point:
        value = value.to(torch.float32)
    elif value.dtype not in (torch.bool, torch.uint8, torch.int8):
        value = value.to(torch.int64)
    return value.contiguous().numpy()
