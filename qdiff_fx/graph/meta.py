"""Typed keys for `node.meta`: what one pass tells the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch.fx import Node

from qdiff_fx.numerics.spec import QuantSpec

T = TypeVar("T")


class MetaKey(Generic[T]):
    """A typed entry of `node.meta`; absent means None."""

    def __init__(self, name: str) -> None:
        self.name = f"qdiff_{name}"

    def get(self, node: Node) -> T | None:
        """The value on `node`, or None."""
        value: T | None = node.meta.get(self.name)
        return value

    def require(self, node: Node) -> T:
        """The value on `node`; a missing one is a bug of ours."""
        value = self.get(node)
        assert value is not None, f"{node.name} carries no {self.name}"
        return value

    def set(self, node: Node, value: T) -> None:
        """Store the value on `node`."""
        node.meta[self.name] = value


@dataclass(frozen=True, kw_only=True)
class SplitPart:
    """One operand of a split shortcut: channels [start, stop) of the cat named `cat`."""

    cat: str
    index: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class LayerPolicy:
    """How one conv or linear is quantized; None keeps that operand in the carrier type."""

    name: str
    operator: str
    weight: QuantSpec | None
    activation: QuantSpec | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class AttentionPolicy:
    """How one attention is quantized; None keeps that operand in the carrier type."""

    name: str
    query_key_value: QuantSpec | None
    probabilities: QuantSpec | None


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A layer's constants as stored in the plan: "int4", "int8" or a floating dtype, and their size."""

    dtype: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class LayerTiming:
    """Microseconds of one layer, of linears that read the same codes, or of an attention.

    Args:
      integer, carrier: on integers, by the fastest kernel, and in the carrier type.
      kernel: that kernel, "" where there is only one.
    """

    integer: float
    carrier: float
    kernel: str = ""


MODULE_PATH: MetaKey[str] = MetaKey("module_path")
"""Dotted path of the module that the node came from, "" for the root."""

SPLIT_PART: MetaKey[SplitPart] = MetaKey("split_part")
"""On the layers that a shortcut split made."""

SPLIT_ADD: MetaKey[bool] = MetaKey("split_add")
"""On the adds that join split parts: they are no residual adds."""

LAYER: MetaKey[LayerPolicy] = MetaKey("layer")
"""On every conv and linear, once annotated."""

ATTENTION: MetaKey[AttentionPolicy] = MetaKey("attention")
"""On every attention, once annotated."""

STORED: MetaKey[StoredWeight] = MetaKey("stored")
"""On the layers of a lowered graph: what the plan holds for them."""

FALLBACK: MetaKey[str] = MetaKey("fallback")
"""On nodes of a lowered graph that do not compute what the plan says: why."""

KERNEL: MetaKey[str] = MetaKey("kernel")
"""On nodes of a lowered graph whose operator's name does not say which kernel runs."""

MERGED: MetaKey[int] = MetaKey("merged")
"""On slices of a lowered graph: of how many layers in one call they are one; the call is their input."""

TIMED: MetaKey[LayerTiming] = MetaKey("timed")
"""On layers and attentions of a lowered graph whose kernel was chosen by timing."""

BLOCK: MetaKey[int] = MetaKey("block")
"""Index of the reconstruction block that owns the node, in execution order."""

FIXED_DTYPE: MetaKey[bool] = MetaKey("fixed_dtype")
"""On casts and factories whose dtype is meant literally (float32 timestep arithmetic), not as the carrier type."""

PARTS: MetaKey[tuple[Node, ...]] = MetaKey("parts")
"""On a call that a whole program stands behind: the calls that it was made of, for reports."""
