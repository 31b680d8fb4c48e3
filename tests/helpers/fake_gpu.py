"""Fake tensors of a GPU in a build of torch that has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Within it, tensors are fakes and may be made on "cuda".

    `Tensor.contiguous` of a build without CUDA looks up the device of a tensor that is not contiguous, even a fake,
    and raises; `clone` is the same operation and does not.
    """
    with FakeTensorMode(), patch.object(Tensor, "contiguous", _contiguous):
        yield


def _contiguous(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    return torch.clone(tensor, memory_format=memory_format)
