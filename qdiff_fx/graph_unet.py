"""A captured network behind the original's call: what prepared and quantized models have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from qdiff_fx.casts import keeping_types, warn_of_cast
from qdiff_fx.errors import CheckpointError, InputError
from qdiff_fx.graph.outputs import OutputStructure
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.graph.skeleton import build_skeleton, output_class, readable


@dataclass
class SampleOutput(BaseOutput):
    """What diffusers UNets return with return_dict=True: `.sample` is the prediction, [B, C, H, W]."""

    sample: Tensor


class GraphUNet(ModelMixin, ConfigMixin):
    """A captured network behind the original's call.

    Args:
      signature: how a call maps to the graph's inputs.
      output: how the graph's outputs map to what the original returned.
      model_config: the original's diffusers config, {} for other modules.
      returns_dict: whether the original takes `return_dict` and returns an output class by default.
    """

    config_name = "config.json"  # type: ignore[assignment]
    qdiff_stage = ""
    _other_type = ""
    _kept_by = ""
    _supports_group_offloading = False  # kernels read the tensors, not the modules that such hooks are put on
    original_class: str
    """Name of the class that the graph was captured from."""

    def __init__(
        self,
        signature: CallSignature,
        output: OutputStructure,
        model_config: Mapping[str, Any],
        *,
        returns_dict: bool,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.signature = signature
        self.output = output
        self.returns_dict = returns_dict
        self.register_to_config(**{key: value for key, value in model_config.items() if not key.startswith("_")})  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        # ModelMixin serves config entries with a deprecation warning; pipelines read unet.in_channels and the like, and
        # parts of the original, such as unet.add_embedding.linear_1.in_features.
        try:
            return torch.nn.Module.__getattr__(self, name)
        except AttributeError:
            config = self.__dict__.get("_internal_dict", {})
            if name in config:
                return config[name]
            try:
                return readable(self._skeleton(), name)
            except AttributeError:
                pass
            raise

    @classmethod
    def from_config(cls, *_args: Any, **_kwargs: Any) -> Any:
        """Refused: diffusers builds its models so to measure them."""
        raise InputError(
            f"a {cls.__name__} is a captured graph, which a config does not describe; load it with from_pretrained, "
            f"and a pipeline that holds it with device_map='cuda' or none in the place of 'balanced'"
        )

    def __copy__(self) -> Self:
        return self._remade(dict(self.__getstate__()))  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._remade(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]

    def _remade(self, state: dict[str, Any]) -> Self:
        result = type(self).__new__(type(self))
        result.__setstate__(state)  # type: ignore[no-untyped-call]
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: what the graph's nodes know of the model is lost in a pickle, which is no safe file either."""
        raise CheckpointError(f"a {type(self).__name__} is not pickled (torch.save does that); {self._kept_by}")

    def _skeleton(self) -> torch.nn.Module | None:
        """The original without weights, built at the first read; no submodule of this one."""
        if "original_class" not in self.__dict__:  # still in __init__
            return None
        if "_original" not in self.__dict__:
            self.__dict__["_original"] = build_skeleton(self.original_class, dict(self.config))
        found: torch.nn.Module | None = self.__dict__["_original"]
        return found

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        """The graph's outputs for flat inputs."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original returns for the same call; `return_dict` both ways where the original takes it.

        A sample of another floating type than the carrier's is cast, and so is the result: the other parts of a
        pipeline may have a type of their own.
        """
        return_dict = kwargs.pop("return_dict", True) if self.returns_dict else False
        outputs = self.run(self.signature.flatten(args, kwargs))
        given = self.signature.sample_dtype(args, kwargs)
        if given is not None and given != self.dtype:
            outputs = [item.to(given) if item.dtype == self.dtype else item for item in outputs]
        result = self.output.unflatten(outputs)
        if not return_dict:
            return result
        if len(result) == 1:
            return SampleOutput(sample=result[0])
        made = output_class(self.original_class)  # a ControlNet's, of several fields
        if made is None:
            raise InputError(f"{self.original_class} returns {len(result)} results; call it with return_dict=False")
        return made(*result)

    @property
    def dtype(self) -> torch.dtype:
        """The carrier type: that of the noisy sample and of everything that is not an integer."""
        return self.signature.input(self.signature.sample).dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        tensor: Tensor | None = next(iter(self.buffers()), None)
        tensor = next(iter(self.parameters()), None) if tensor is None else tensor
        return torch.device("cpu") if tensor is None else tensor.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.half()` and their kin do: move, without a cast, which is warned of."""
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        if dtype != self.dtype:
            warn_of_cast(self.qdiff_stage, self.dtype, dtype, self._other_type)
        super()._apply(keeping_types(fn), recurse)  # type: ignore[no-untyped-call]
        return self
