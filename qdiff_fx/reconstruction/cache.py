"""Block inputs and targets, a row a sample: in memory up to a budget, in memory-mapped files beyond."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from qdiff_fx.errors import CalibrationError


class ActivationCache:
    """Named tensors [N, ...], all contiguous (a cached tensor with the strides of an attention crashes oneDNN).

    Args:
      budget: bytes in memory; what does not fit lives in files.
      folder: for the files; None makes a temporary folder when it is needed.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.budget, self.folder = budget, folder
        self.memory_bytes = self.file_bytes = self.peak_bytes = 0
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def allocate(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A new tensor of that shape, with the dtype and, in memory, the device of `like`.

        Raises: CalibrationError if there is no room for its file.
        """
        size = math.prod(shape) * like.element_size()
        if self.memory_bytes + size <= self.budget:
            self._tensors[name] = torch.empty(shape, dtype=like.dtype, device=like.device)
            self.memory_bytes += size
        else:
            self._tensors[name] = self._mapped(name, shape, like.dtype)
            self.file_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.memory_bytes + self.file_bytes)
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def release(self, name: str) -> None:
        """Forget the tensor and delete its file."""
        tensor = self._tensors.pop(name)
        size = tensor.numel() * tensor.element_size()
        path = self._files.pop(name, None)
        if path is None:
            self.memory_bytes -= size
        else:
            self.file_bytes -= size
            path.unlink()

    def close(self) -> None:
        """Release everything."""
        for name in list(self._tensors):
            self.release(name)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _mapped(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="qdiff_fx_", dir=self.folder)
        path = Path(self._temporary.name) / f"{self._count}.bin"
        self._count += 1
        try:
            tensor = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype)
        except RuntimeError as error:
            raise CalibrationError(
                f"{path}: no room for {math.prod(shape) * dtype.itemsize} bytes of block inputs ({error}); "
                f"free space, raise cache_bytes={self.budget}, or calibrate on fewer samples"
            ) from error
        self._files[name] = path
        return tensor.view(shape)
