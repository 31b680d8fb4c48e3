"""The cache keeps to its budget and cleans up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qdiff_fx.errors import CalibrationError
from qdiff_fx.reconstruction.cache import ActivationCache


def test_what_exceeds_the_budget_lives_in_files_with_the_same_values(tmp_path: Path) -> None:
    cache = ActivationCache(budget=400, folder=tmp_path)
    values = {name: torch.randn(10, 7) for name in "abc"}  # 280 bytes each
    for name, value in values.items():
        cache.allocate(name, (10, 7), value).copy_(value)
    assert (cache.memory_bytes, cache.file_bytes, cache.peak_bytes) == (280, 560, 840)
    assert len(list(tmp_path.rglob("*.bin"))) == 2
    assert all(torch.equal(cache[name], value) for name, value in values.items())
    cache.close()
    assert not list(tmp_path.iterdir()) and cache.memory_bytes == cache.file_bytes == 0


def test_released_memory_is_used_again(tmp_path: Path) -> None:
    cache = ActivationCache(budget=100, folder=tmp_path)
    like = torch.zeros(1)
    cache.allocate("a", (20,), like)
    cache.release("a")
    cache.allocate("b", (20,), like)
    assert "a" not in cache and "b" in cache and cache.file_bytes == 0


def test_cached_tensors_are_contiguous_whatever_their_source() -> None:
    cache = ActivationCache(budget=10**6)
    source = torch.randn(2, 3, 4).transpose(1, 2)
    assert cache.allocate("a", tuple(source.shape), source).is_contiguous()


def test_a_full_disk_names_the_setting(tmp_path: Path) -> None:
    cache = ActivationCache(budget=0, folder=tmp_path)
    with pytest.raises(CalibrationError, match="cache_bytes=0"):
        cache.allocate("a", (2**60,), torch.zeros(1))
    cache.close()
