"""What the rest of the library needs to know of a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A way to run the qdiff:: operators.

    Args:
      name: as in `convert(backend=)`.
      unavailable: given a device type ("cpu", "cuda"), why this machine cannot run it, or None if it can.
      traceable: whether what it lowers to is for torch.compile; False where an engine of its own compiled it already.
      devices: the types that it is meant for; on others "auto" passes it over, even where it can be made to run.
    """

    name: str
    unavailable: Callable[[str], str | None]
    devices: tuple[str, ...] = ("cpu", "cuda")
    traceable: bool = True
