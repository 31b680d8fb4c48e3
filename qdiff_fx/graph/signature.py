"""How a module's call maps to a graph's flat inputs and back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qdiff_fx.errors import InputError

_TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma", "sigmas", "noise_level")
_RETURN_DICT = "return_dict"


@dataclass(frozen=True, kw_only=True)
class GraphInput:
    """One flat input: a tensor leaf of the call."""

    name: str
    argument: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]
    """None marks a dynamic dimension."""
    batched: bool = False
    """Whether the first dimension is the sample's batch."""


@dataclass(frozen=True, kw_only=True)
class CallSignature:
    """The one call form that a graph was captured for.

    Args:
      inputs: the flat inputs in graph order.
      parameters: names of the module's forward parameters, in order, without `return_dict`.
      structure: per parameter that the example call gave, its nesting; leaves are input names or constants.
      sample: name of the flat input that holds the noisy sample.
      timestep: name of the flat input that holds the noise level, None if there is none.
      size_multiple: height and width of the sample must be multiples of this (the network's downsampling).
    """

    inputs: tuple[GraphInput, ...]
    parameters: tuple[str, ...]
    structure: Mapping[str, Any]
    sample: str
    timestep: str | None
    size_multiple: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Flat input names in graph order."""
        return tuple(item.name for item in self.inputs)

    def input(self, name: str) -> GraphInput:
        """The flat input called `name`."""
        return next(item for item in self.inputs if item.name == name)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The graph's flat inputs for this call. Raises InputError where it differs from the captured call form."""
        bound = bind_call(self.parameters, args, kwargs)
        found: dict[str, Tensor] = {}
        for parameter in self.parameters:
            given, wanted = bound.get(parameter), self.structure.get(parameter)
            if given is None and wanted is None:
                continue
            _match(parameter, wanted, given, found)
        sample = found[self.sample]
        if sample.dim() == 4 and (sample.shape[2] % self.size_multiple or sample.shape[3] % self.size_multiple):
            raise InputError(
                f"{self.sample}: {sample.shape[2]} x {sample.shape[3]}, want multiples of {self.size_multiple}: "
                f"the network downsamples by that much; pad the input"
            )
        return tuple(self._conform(item, found[item.name], sample) for item in self.inputs)

    def row_shapes(self, inputs: Sequence[Tensor]) -> dict[str, list[int]]:
        """Shapes of flat inputs by name, without the batch."""
        return {item.name: list(value.shape[item.batched :]) for item, value in zip(self.inputs, inputs, strict=True)}

    def sample_dtype(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.dtype | None:
        """The floating type of the sample in this call; None if it is no argument of its own, or no tensor."""
        given = bind_call(self.parameters, args, kwargs).get(self.sample)
        return given.dtype if isinstance(given, Tensor) and given.is_floating_point() else None

    def _conform(self, item: GraphInput, value: Tensor, sample: Tensor) -> Tensor:
        if item.name == self.timestep:
            return _noise_levels(item, value.to(device=sample.device, dtype=item.dtype), sample)
        if value.dim() != len(item.shape):
            raise InputError(f"{item.name}: shape {tuple(value.shape)}, captured with {len(item.shape)} dimensions")
        for axis, (size, wanted) in enumerate(zip(value.shape, item.shape, strict=True)):
            if wanted is not None and size != wanted:
                raise InputError(
                    f"{item.name}: shape {tuple(value.shape)}, want {wanted} in dimension {axis} as at prepare(); "
                    f"this model was captured for that width"
                )
        if item.batched and value.shape[0] != sample.shape[0]:
            raise InputError(
                f"{item.name}: {value.shape[0]} rows for a batch of {sample.shape[0]}; "
                f"repeat it to one for each row of {self.sample} (with guidance, both branches count)"
            )
        if value.is_floating_point() != item.dtype.is_floating_point and item.name == self.sample:
            raise InputError(f"{item.name}: {value.dtype}, captured as {item.dtype}; cast and scale it to that")
        return value.to(dtype=item.dtype) if value.is_floating_point() else value

    def unflatten(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """Keyword arguments of the original module's forward for these flat inputs."""
        values = dict(zip(self.names, inputs, strict=True))
        return {parameter: _build(node, values) for parameter, node in self.structure.items()}


def bind_call(parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by parameter name, without `return_dict` and without None."""
    if len(args) > len(parameters):
        raise InputError(
            f"{len(args)} positional arguments, the model takes {len(parameters)}: {', '.join(parameters)}"
        )
    bound = dict(zip(parameters, args, strict=False))
    for name, value in kwargs.items():
        if name == _RETURN_DICT:
            continue
        if name in bound:
            raise InputError(f"argument {name} given twice")
        if name not in parameters:
            raise InputError(f"unknown argument {name!r}; the model takes {', '.join(parameters)}")
        bound[name] = value
    return {name: value for name, value in bound.items() if value is not None}


def derive_signature(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, sample_input: str | None = None
) -> tuple[CallSignature, tuple[Tensor, ...]]:
    """The call signature of an example call, and the call's flat inputs.

    Numbers become 0-d tensors only where they are the timestep; other non-tensor leaves are constants of the capture.
    """
    parameters = forward_parameters(module)
    bound = bind_call(parameters, args, kwargs)
    timestep_argument = next((name for name in _TIMESTEP_NAMES if name in bound), None)
    inputs: list[GraphInput] = []
    values: list[Tensor] = []

    def visit(name: str, argument: str, value: Any) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return {"constant": value}
        if isinstance(value, (int, float)) and argument == timestep_argument:
            value = torch.tensor([float(value)], dtype=torch.float32)
        if isinstance(value, Tensor):
            inputs.append(GraphInput(name=name, argument=argument, dtype=value.dtype, shape=tuple(value.shape)))
            values.append(value)
            return {"input": name}
        if isinstance(value, (int, float)):
            return {"constant": value}
        if isinstance(value, (list, tuple)):
            items = [visit(f"{name}_{index}", argument, item) for index, item in enumerate(value)]
            return {"list" if isinstance(value, list) else "tuple": items}
        if isinstance(value, Mapping):
            return {"dict": {key: visit(f"{name}_{key}", argument, item) for key, item in value.items()}}
        raise InputError(f"{name}: {type(value).__name__}; want tensors, numbers, strings, or lists and dicts of them")

    structure = {name: visit(name, name, bound[name]) for name in parameters if name in bound}
    if not inputs:
        raise InputError("the example call holds no tensor; pass example_inputs=(sample, timestep, ...)")
    sample = sample_input or _default_sample(inputs)
    if sample not in [item.name for item in inputs]:
        raise InputError(f"sample_input={sample!r}: want one of {', '.join(item.name for item in inputs)}")
    timestep = next((item.name for item in inputs if item.argument == timestep_argument), None)
    if timestep is None:
        timestep = next((item.name for item in inputs if len(item.shape) <= 1), None)
    signature = CallSignature(
        inputs=tuple(inputs), parameters=parameters, structure=structure, sample=sample, timestep=timestep
    )
    return signature, tuple(values)


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of `module.forward`, without `return_dict`."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(item.kind is item.VAR_POSITIONAL for item in parameters):
        raise InputError(f"{type(module).__name__}.forward takes *args; wrap it in a module that names its arguments")
    return tuple(item.name for item in parameters if item.kind is not item.VAR_KEYWORD and item.name != _RETURN_DICT)


def tree_leaves(value: Any) -> list[Any]:
    """Leaves of nested lists, tuples and dicts."""
    return pytree.tree_leaves(value)


def _default_sample(inputs: Sequence[GraphInput]) -> str:
    return next((item.name for item in inputs if len(item.shape) == 4), inputs[0].name)


def _match(path: str, wanted: Any, given: Any, found: dict[str, Tensor]) -> None:
    """Collect the tensors of `given` under the names in `wanted`; the nesting must be the captured one."""
    remedy = "prepare the model again with such a call as example_inputs / example_kwargs"
    if wanted is None or given is None:
        state = "not given" if given is None else "given"
        raise InputError(f"{path} is {state}, at prepare() it was {'' if given is None else 'not '}given; {remedy}")
    ((kind, content),) = wanted.items()
    if kind == "input":
        found[content] = given if isinstance(given, Tensor) else _as_tensor(path, given)
    elif kind == "constant":
        if given != content:
            raise InputError(f"{path}={given!r}, captured with the constant {content!r}; {remedy}")
    elif kind == "dict":
        if not isinstance(given, Mapping) or set(given) != set(content):
            raise InputError(f"{path}: want a dict with keys {sorted(content)}; {remedy}")
        for key, node in content.items():
            _match_leaf(f"{path}.{key}", node, given[key], found)
    else:
        if not isinstance(given, (list, tuple)) or len(given) != len(content):
            raise InputError(f"{path}: want a {kind} of {len(content)}; {remedy}")
        for index, node in enumerate(content):
            _match_leaf(f"{path}[{index}]", node, given[index], found)


def _as_tensor(path: str, given: Any) -> Tensor:
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}={given!r:.60}: want a tensor or a number") from error


def _noise_levels(item: GraphInput, value: Tensor, sample: Tensor) -> Tensor:
    """One noise level for each sample, where the graph takes them so."""
    if value.numel() == 1 and len(item.shape) < 2:
        # Contiguous, so that compiled code meets one set of strides.
        return value.reshape(()).expand(sample.shape[: len(item.shape)]).contiguous()
    if value.dim() != len(item.shape) or (value.dim() == 1 and len(value) != len(sample)):
        raise InputError(
            f"{item.name}: shape {tuple(value.shape)} for a batch of {len(sample)}, captured with {len(item.shape)} "
            f"dimensions; give one value, or one for each sample"
        )
    return value


def _match_leaf(path: str, wanted: Any, given: Any, found: dict[str, Tensor]) -> None:
    if wanted == {"constant": None} and given is None:
        return
    _match(path, wanted, given, found)


def _build(node: Any, values: Mapping[str, Any]) -> Any:
    ((kind, content),) = node.items()
    if kind == "input":
        return values[content]
    if kind == "constant":
        return content
    if kind == "dict":
        return {key: _build(item, values) for key, item in content.items()}
    items = [_build(item, values) for item in content]
    return items if kind == "list" else tuple(items)
