"""Calls of a prepared network that name the layer at fault where a result is not finite."""

from __future__ import annotations

from typing import Any

import torch

from qdiff_fx.errors import NonFiniteError
from qdiff_fx.graph.finite import FiniteRun, is_finite
from qdiff_fx.model import PreparedUNet


def finite_call(prepared: PreparedUNet, network: str, *args: Any, **kwargs: Any) -> Any:
    """What `prepared` returns for this call, which must be finite.

    Args:
      network: what `prepared` is at the moment, for the error: "full-precision" or "quantized".

    Raises: NonFiniteError that names the network, the timesteps and the first layer to make NaN or infinity, which a
      second run of the call finds, node by node.
    """
    try:
        output = prepared(*args, **kwargs)
        if is_finite(output):
            return output
        found = NonFiniteError("its output holds NaN or infinity")
    except NonFiniteError as refused:  # by an observer, which knows the layer that reads the value, not its maker
        found = refused
    try:
        with torch.no_grad():
            FiniteRun(prepared.graph_module).run(*prepared.signature.flatten(args, kwargs))
    except NonFiniteError as error:
        found = error
    raise NonFiniteError(f"the {network} network{_timesteps(prepared)}: {found}") from found


def _timesteps(prepared: PreparedUNet) -> str:
    """Of the last call, as " at timestep 3", "" where the model has none."""
    seen = prepared.noise_level.timesteps
    if seen is None:
        return ""
    values = sorted(set(seen.tolist()))
    return f" at timestep{'s' if len(values) > 1 else ''} {', '.join(f'{value:g}' for value in values)}"
