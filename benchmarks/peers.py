"""Other tools that quantize a UNet, behind one call: quantize(name, unet, calls) -> a callable with its bytes.

    network = peers.quantize("sdnq uint4", unet, calls)
    network(sample, timestep, return_dict=False)[0]; network.bytes

Each tool is imported when it is asked for (extra [peers]); convolutions are included wherever the tool can. What
a tool leaves alone stays fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import qdiff_fx

Calls = Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
"""Recorded calls (args, kwargs) of the full-precision network: calibration data."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A quantized network that is called like the original.

    Args:
      call: the network.
      bytes: of all its tensors as they are kept.
      bits: of weights and activations, for tables.
    """

    call: Callable[..., Any]
    bytes: int
    bits: str

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """The prediction [B, C, H, W], in a tuple as with return_dict=False."""
        with torch.no_grad():
            found = self.call(*args, **kwargs)
        found = getattr(found, "sample", found)
        return (found[0] if isinstance(found, (tuple, list)) else found,)


def quantize(name: str, unet: nn.Module, calls: Calls) -> Network:
    """`unet`, which stays as it is, quantized by the peer called `name`.

    Args:
      name: a key of PEERS.
      calls: calibration data for the peers that want any.

    Raises: KeyError for an unknown name; whatever the tool raises: callers put it into the table.
    """
    with torch.no_grad():
        return PEERS[name](copy.deepcopy(unet).eval(), calls)


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor keeps; of a subclass, those of the tensors inside."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage counted once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor_bytes(tensor) for tensor in tensors.values())


def _full_precision(unet: nn.Module, calls: Calls) -> Network:
    del calls
    return Network(call=unet, bytes=module_bytes(unet), bits="W32A32")


def _sdnq(unet: nn.Module, calls: Calls, *, bits: str, **options: Any) -> Network:
    from sdnq import sdnq_post_load_quant

    del calls
    network = sdnq_post_load_quant(unet, quant_conv=True, torch_dtype=torch.float32, **options)
    return Network(call=network, bytes=module_bytes(network), bits=bits)


def _torchao(unet: nn.Module, calls: Calls, *, config: str, bits: str) -> Network:
    from torchao import quantization

    del calls
    quantization.quantize_(unet, getattr(quantization, config)())
    return Network(call=unet, bytes=module_bytes(unet), bits=bits)


def _quanto(unet: nn.Module, calls: Calls, *, weights: str, bits: str, activations: str | None = None) -> Network:
    from optimum import quanto

    quanto.quantize(
        unet,
        weights=getattr(quanto, weights),
        activations=None if activations is None else getattr(quanto, activations),
    )
    if activations is not None:
        with quanto.Calibration():
            for args, kwargs in calls:
                unet(*args, **kwargs)
    quanto.freeze(unet)
    return Network(call=unet, bytes=module_bytes(unet), bits=bits)


class _Flat(nn.Module):
    """A UNet whose inputs are tensors by position, as converters want it."""

    def __init__(self, unet: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.unet, self.names = unet, names

    def forward(self, sample: Tensor, timestep: Tensor, *others: Tensor) -> Tensor:
        named = dict(zip(self.names, others, strict=True))
        prediction: Tensor = self.unet(sample, timestep, return_dict=False, **named)[0]
        return prediction

    def example(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """A call as this module takes it: a timestep for every row."""
        sample, timestep = args
        steps = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1).expand(len(sample)).contiguous()
        return sample, steps, *(kwargs[name] for name in self.names)

    @classmethod
    def of(cls, unet: nn.Module, calls: Calls) -> _Flat:
        """With the inputs that `calls` have."""
        return cls(unet, tuple(name for name in calls[0][1] if name != "return_dict"))


_ROWS = 16
"""Rows of a call of networks that are exported for one batch: those of the table's end points."""


class _Fixed:
    """Calls of a network that takes one number of rows: cut, and the last part filled up with its last row."""

    def __init__(self, flat: _Flat, calls: Calls) -> None:
        self.flat = flat
        self.rows = min(_ROWS, len(calls[0][0][0]))
        self.calls = [part for args, kwargs in calls for part, _ in self._parts(flat.example(args, kwargs))]

    def _parts(self, tensors: Sequence[Tensor]) -> Iterator[tuple[tuple[Tensor, ...], int]]:
        for start in range(0, len(tensors[0]), self.rows):
            part = [tensor[start : start + self.rows] for tensor in tensors]
            count = len(part[0])
            if count == self.rows:  # nothing to pay for in a timing
                yield tuple(part), count
                continue
            last = [tensor[-1:].expand(self.rows - count, *tensor.shape[1:]) for tensor in part]
            yield tuple(torch.cat(pair) for pair in zip(part, last, strict=True)), count

    def run(self, network: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor]:
        """What `network` makes of a call of any number of rows."""
        results = [network(*part)[:count] for part, count in self._parts(self.flat.example(args, kwargs))]
        return (results[0] if len(results) == 1 else torch.cat(results),)


def _nncf(unet: nn.Module, calls: Calls, *, precision: str = "f32") -> Network:
    import nncf
    import openvino
    from openvino import properties

    flat = _Flat.of(unet, calls)
    example = flat.example(*calls[0])
    model = openvino.convert_model(flat, example_input=example)
    model.reshape({item: [-1, *example[index].shape[1:]] for index, item in enumerate(model.inputs)})
    data = nncf.Dataset([[tensor.numpy() for tensor in flat.example(*call)] for call in calls])
    quantized = nncf.quantize(model, data, subset_size=len(calls))
    kept = sum(node.data.nbytes for node in quantized.get_ops() if node.get_type_name() == "Constant")
    options = {
        properties.hint.inference_precision(): precision,
        properties.inference_num_threads(): torch.get_num_threads(),
    }
    compiled = openvino.compile_model(quantized, "CPU", options)

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        result = compiled([tensor.numpy() for tensor in flat.example(args, kwargs)])
        return (torch.from_numpy(result[0].copy()),)

    return Network(call=run, bytes=kept, bits="W8A8")


def _pt2e(unet: nn.Module, calls: Calls) -> Network:
    """The fusions of inductor register when this quantizer's module is imported, and need constants frozen."""
    from torch._inductor import config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    flat = _Flat.of(unet, calls)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    fixed = _Fixed(flat, calls)
    prepared = prepare_pt2e(torch.export.export(flat, fixed.calls[0]).module(), quantizer)
    for call in fixed.calls:
        prepared(*call)
    converted = convert_pt2e(prepared)
    compiled = torch.compile(converted)

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        with config.patch(freezing=True):
            return fixed.run(compiled, args, kwargs)

    return Network(call=run, bytes=module_bytes(converted), bits="W8A8")


def _onnxruntime(unet: nn.Module, calls: Calls) -> Network:
    import tempfile
    from pathlib import Path

    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    flat = _Flat.of(unet, calls)
    fixed = _Fixed(flat, calls)
    example = fixed.calls[0]
    names = [f"input_{index}" for index in range(len(example))]

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        rows = iter([dict(zip(names, (tensor.numpy() for tensor in call), strict=True)) for call in fixed.calls])

        def get_next(self) -> Any:
            return next(self.rows, None)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        exported, ready, quantized = (str(Path(folder, f"{name}.onnx")) for name in ("fp32", "ready", "int8"))
        torch.onnx.export(flat, example, exported, input_names=names, dynamo=True, external_data=True)
        quant_pre_process(exported, ready, skip_symbolic_shape=True, save_as_external_data=True)
        quantize_static(
            ready,
            quantized,
            Reader(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            use_external_data_format=True,
        )
        kept = sum(file.stat().st_size for file in Path(folder).glob("int8*"))
        session = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])

    def network(*tensors: Tensor) -> Tensor:
        given = zip(names, (tensor.numpy() for tensor in tensors), strict=True)
        return torch.from_numpy(session.run(None, dict(given))[0])

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        return fixed.run(network, args, kwargs)

    return Network(call=run, bytes=kept, bits="W8A8")


def _ours(
    unet: nn.Module, calls: Calls, *, preset: str, learn: bool = False, leave: int = 0, **changes: Any
) -> Network:
    import tempfile
    from pathlib import Path

    from qdiff_fx.report.documents import stored_bytes

    left = tuple(
        qdiff_fx.LayerRule(module=name, weight_bits=32, activation_bits=32)
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.numel() < leave
    )
    prepared = qdiff_fx.prepare(unet, qdiff_fx.QDiffConfig.preset(preset, rules=left, **changes))
    learning = qdiff_fx.ReconstructionConfig.preset("fast") if learn else None
    with torch.enable_grad():
        qdiff_fx.calibrate(prepared, list(calls), reconstruction=learning, progress=False)
    quantized = qdiff_fx.convert(prepared)
    with tempfile.TemporaryDirectory() as folder:
        qdiff_fx.save(quantized, folder)
        kept = stored_bytes(Path(folder))
    return Network(call=quantized, bytes=kept, bits=preset.upper())


SMALL = 16_384
"""SDNQ leaves layers with fewer weights alone by default: on the bundled models, the most sensitive ones."""
_UINT4: Mapping[str, Any] = {"weights_dtype": "uint4", "bits": "W4A32"}
_DYNAMIC: Mapping[str, Any] = {"use_quantized_matmul": True, "use_quantized_matmul_conv": True, "bits": "W8A8 dynamic"}
SDNQ: Mapping[str, Mapping[str, Any]] = {
    "SDNQ int8": {"weights_dtype": "int8", "bits": "W8A32"},
    "SDNQ int8, dynamic int8 activations": {"weights_dtype": "int8", **_DYNAMIC},
    "SDNQ uint4": _UINT4,
    "SDNQ uint4, SVD": {"use_svd": True, **_UINT4},
    "SDNQ uint4, Hadamard rotation": {"use_hadamard": True, **_UINT4},
}
_WIDE: Mapping[str, Any] = {"preset": "w8a8", "weight_slack": 0.10, "activation_slack": 0.25}
_EVERY_LAYER: Mapping[str, Any] = {"minimum_allowed_numel": 0, "minimum_allowed_channel_size": 0}

PEERS: Mapping[str, Callable[[nn.Module, Calls], Network]] = {
    "full precision": _full_precision,
    "ours W8A8": partial(_ours, preset="w8a8"),
    "ours W4A8": partial(_ours, preset="w4a8"),
    "ours W8A8, wide slacks": partial(_ours, **_WIDE),
    "ours W8A8, small layers left": partial(_ours, preset="w8a8", leave=SMALL),
    "ours W4A8, small layers left": partial(_ours, preset="w4a8", leave=SMALL),
    "ours W4A32": partial(_ours, preset="w4a32"),
    "ours W4A8, reconstructed": partial(_ours, preset="w4a8", learn=True),
    "ours W8A8, reconstructed": partial(_ours, preset="w8a8", learn=True),
    "ours W8A8, wide slacks, reconstructed": partial(_ours, learn=True, **_WIDE),
    **{name: partial(_sdnq, **options) for name, options in SDNQ.items()},
    **{f"{name}, every layer": partial(_sdnq, **_EVERY_LAYER, **options) for name, options in SDNQ.items()},
    "torchao int8 weights, linears": partial(_torchao, config="Int8WeightOnlyConfig", bits="W8A32"),
    "torchao int8, dynamic int8 activations, linears": partial(
        _torchao, config="Int8DynamicActivationInt8WeightConfig", bits="W8A8 dynamic"
    ),
    "quanto int8 weights": partial(_quanto, weights="qint8", bits="W8A32"),
    "quanto int8 weights and activations": partial(_quanto, weights="qint8", activations="qint8", bits="W8A8"),
    "quanto int4 weights": partial(_quanto, weights="qint4", bits="W4A32"),
    "NNCF int8 on OpenVINO": _nncf,
    "NNCF int8 on OpenVINO, bf16": partial(_nncf, precision="bf16"),
    "torchao PT2E, X86InductorQuantizer": _pt2e,
    "ONNX Runtime int8": _onnxruntime,
}
"""By the name in tables; ours and full precision stand among them so that all run through the same code."""
