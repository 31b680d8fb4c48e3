"""Modules whose buffers get their shapes from the data that they see."""

from typing import Any

import torch
from torch import Tensor, nn


class RunningState(nn.Module):
    """A module with statistics for buffers: their shapes are unknown at first, their dtypes never change.

    `load_state_dict` takes on the stored shapes, so that calibration resumes in a fresh module. `.to(dtype)` of a
    surrounding model moves the statistics but does not round them: a range in bf16 would clip what it was made from.
    """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name, buffer in self._buffers.items():
            stored = state_dict.get(prefix + name)
            if buffer is not None and isinstance(stored, Tensor):
                self._buffers[name] = torch.empty(stored.shape, dtype=buffer.dtype, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
