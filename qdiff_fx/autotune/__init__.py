"""Which kernels run faster on this machine, found by timing them on the sizes of calibration."""

from collections.abc import Callable, Iterable, Mapping

from torch import fx

from qdiff_fx.autotune import cuda, x86
from qdiff_fx.autotune.choose import Choices, Subject, Timings, choose

__all__ = ["TUNERS", "Choices", "Subject", "Timings", "choose"]

TUNERS: Mapping[str, Callable[[fx.GraphModule], Iterable[Subject]]] = {"x86": x86.subjects, "cuda": cuda.subjects}
"""Backends that choose by timing, and what they time of a graph before its layers are lowered."""
