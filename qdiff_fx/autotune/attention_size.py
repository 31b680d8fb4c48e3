"""What the time of an attention depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qdiff_fx.autotune.layer_size import sizes
from qdiff_fx.graph.edit import shape_of
from qdiff_fx.graph.propagate import size_hint


@dataclass(frozen=True, kw_only=True)
class AttentionSize:
    """The size of an attention in calibration.

    Args:
      shapes: of q, k and v.
      mask: shape and dtype of its mask, or None.
      is_causal: whether later keys are hidden.
      dtype: the carrier type.
    """

    shapes: tuple[tuple[int, ...], ...]
    mask: tuple[tuple[int, ...], torch.dtype] | None
    is_causal: bool
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """One line that two attentions share if and only if they take the same time."""
        parts = ["attention", *(sizes(shape) for shape in self.shapes)]
        if self.mask is not None:
            parts.append(f"mask {sizes(self.mask[0])} {_name(self.mask[1])}")
        parts += ["causal"] if self.is_causal else []
        return ", ".join([*parts, _name(self.dtype)])


def attention_size(node: fx.Node) -> AttentionSize:
    """The size of a qdiff.attention."""
    arguments: Any = node.args
    mask = arguments[3]
    return AttentionSize(
        shapes=tuple(_shape(item) for item in arguments[:3]),
        mask=None if mask is None else (_shape(mask), mask.meta["val"].dtype),
        is_causal=bool(arguments[4]),
        dtype=node.meta["val"].dtype,
    )


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(size_hint(size) for size in shape_of(node) or ())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
