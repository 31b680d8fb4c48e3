"""What the time of a layer depends on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qdiff_fx.graph.edit import shape_of
from qdiff_fx.graph.propagate import size_hint
from qdiff_fx.passes.lower.integer_layers import IntegerLayer, quantized_alone


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """The size of a layer; of linears that read the same codes, of all of them together.

    Args:
      x_shape: of the input in calibration.
      weight_shapes: one, or one a linear.
      geometry: stride, padding, dilation, groups of a convolution, None for linears.
      dtype: the carrier type.
      quantized_alone: whether the quantize step is a kernel of its own.
      weights: how they are stored, where kernels read them so ("int8", "int4", "int4 with shifts"), else "".
    """

    x_shape: tuple[int, ...]
    weight_shapes: tuple[tuple[int, ...], ...]
    geometry: tuple[list[int], list[int], list[int], int] | None
    dtype: torch.dtype
    quantized_alone: bool
    weights: str = ""

    @property
    def key(self) -> str:
        """One line that two layers share if and only if they take the same time."""
        parts = ["linear" if self.geometry is None else "conv2d", sizes(self.x_shape)]
        parts.append("+".join(sizes(shape) for shape in self.weight_shapes))
        if self.geometry is not None:
            stride, padding, dilation, groups = self.geometry
            parts += [f"stride {sizes(stride)}", f"padding {sizes(padding)}", f"dilation {sizes(dilation)}"]
            parts.append(f"groups {groups}")
        parts.append(str(self.dtype).removeprefix("torch."))
        parts += [self.weights] if self.weights else []
        return ", ".join([*parts, "quantized alone"] if self.quantized_alone else parts)


def layer_size(unit: list[IntegerLayer], *, weights: str = "") -> LayerSize:
    """The size of a layer, or of linears that read the same codes, in calibration."""
    first = unit[0]
    return LayerSize(
        x_shape=tuple(size_hint(size) for size in shape_of(first.x) or ()),
        weight_shapes=tuple(tuple(layer.weight_shape) for layer in unit),
        geometry=first.geometry if first.is_conv2d else None,
        dtype=first.output_dtype,
        quantized_alone=quantized_alone(first.x),
        weights=weights,
    )


def sizes(values: Iterable[int]) -> str:
    """As keys write a shape: 2x320x64x64."""
    return "x".join(str(value) for value in values)
