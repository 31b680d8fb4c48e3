"""What a stored model is, apart from how it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qdiff_fx.config import QDiffConfig
from qdiff_fx.graph.outputs import OutputStructure
from qdiff_fx.graph.signature import CallSignature


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A converted network, backend-neutral.

    Args:
      plan: the CONVERT-level graph with fake values on its nodes.
      config: how it was quantized.
      signature: how a call maps to the graph's inputs.
      output: how the graph's outputs map to the result.
      model_config: the original's diffusers config, {} for other modules.
      returns_dict: whether the original takes `return_dict`.
      calibration: what calibration found, plain JSON types.
    """

    plan: fx.GraphModule
    config: QDiffConfig
    signature: CallSignature
    output: OutputStructure
    model_config: Mapping[str, Any]
    returns_dict: bool
    calibration: Mapping[str, Any]

    @property
    def carrier(self) -> torch.dtype:
        """The type of everything that is not an integer, a scale or timestep arithmetic."""
        return self.signature.input(self.signature.sample).dtype
