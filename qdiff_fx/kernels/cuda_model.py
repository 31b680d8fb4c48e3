"""A performance model of layers and attentions on a GPU: what lowering goes by until timings replace it.

A kernel takes as long as the slowest of its shares: tensor-core operations, bytes from and to memory, and for
attention the exponentials and the arithmetic around them. `floor` is at the maker's peaks; `predicted` at the shares of
them that kernels reach, the constants below, and for our layers' kernel by what its best tile takes
(`cuda_tiles.tile_cycles`). docs/results-cuda-model.md tabulates both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from qdiff_fx.kernels.cuda_gpu import Gpu
from qdiff_fx.kernels.cuda_tiles import Product, layer_tiles, tile_cycles

CARRIER_SHARE, CARRIER_LAUNCH = 0.68, 5e-6
"""Share of the fp16 peak, and seconds beside it: the vendor's matmuls, fitted to an H100's times of 31 layers."""

CARRIER_CONV_SHARE, CARRIER_CONV_LAUNCH = 0.62, 11e-6
"""Likewise of its convolutions, by 33 layers of 3 x 3."""

VENDOR_INTEGER_SHARE, VENDOR_INTEGER_LAUNCH = 0.45, 10e-6
"""Likewise of the int8 peak: the vendor's int8 matmul and the kernel that ends the layer."""

QUANTIZE_LAUNCH = 2e-6
"""Seconds of a quantize step's kernel of its own beside its bytes."""

ATTENTION_SHARE = 0.6
"""Of either peak, in attention."""

MEMORY_SHARE = 0.85
"""Of the memory's bandwidth."""

EXPONENTIALS_PER_CYCLE = 16
"""Of one multiprocessor."""

VECTOR_LANES = 128
"""float32 operations a cycle of one multiprocessor (64 on sm_80)."""

CARRIER_SCORE_OPERATIONS, INTEGER_SCORE_OPERATIONS = 19, 100
"""float32 and int32 operations a score, as an H100's times read: scale, maximum, difference, sum, cast; ours does all
but the last twice, corrects zero points, rounds and sums codes, and moves codes between registers."""

CARRIER_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of one kernel, and what they are made of.

    Args:
      floor: at the peaks.
      predicted: at the assumed shares of them.
      operations: multiplications and additions.
      bytes: from and to memory, each tensor once.
      bound: "compute", "memory" or "vector": what the predicted time is made of.
    """

    floor: float
    predicted: float
    operations: float
    bytes: float
    bound: str


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """One layer's work.

    Args:
      product: the layer as the kernel sees it.
      input_elements: of its activation.
      quantized_alone: whether its codes are made by a kernel of their own, because what writes the input is no kernel
        that a compiler can extend (another layer, an attention, the caller).
    """

    product: Product
    input_elements: int
    quantized_alone: bool = False

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        product = self.product
        return 2.0 * product.rows * product.outputs * product.groups * product.depth * product.taps

    @property
    def weights(self) -> int:
        """Number of weights."""
        product = self.product
        return product.outputs * product.groups * product.depth * product.taps

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self.product.rows * self.product.outputs * self.product.groups


def integer_layer(work: LayerWork, gpu: Gpu) -> Estimate:
    """The layer by the fused int8 kernel with its best tile, output in a 16-bit carrier."""
    product = work.product
    moved = work.input_elements + work.weights * (0.5 if product.packed else 1.0) + CARRIER_BYTES * work.outputs
    kernel = min(tile_cycles(product, tile, gpu) for tile in layer_tiles(product, gpu)) / (1e9 * gpu.gigahertz)
    return _layer(work, gpu.int8_tops, moved, gpu, kernel)


def vendor_integer_layer(work: LayerWork, gpu: Gpu) -> Estimate:
    """A linear by torch._int_mm, whose int32 result another kernel reads."""
    moved = work.input_elements + work.weights + (2 * 4 + CARRIER_BYTES) * work.outputs
    kernels = work.operations / (VENDOR_INTEGER_SHARE * gpu.int8_tops * 1e12) + VENDOR_INTEGER_LAUNCH
    kernels += (4 + CARRIER_BYTES) * work.outputs / (MEMORY_SHARE * gpu.bandwidth * 1e9)
    return _layer(work, gpu.int8_tops, moved, gpu, kernels)


def carrier_layer(work: LayerWork, gpu: Gpu) -> Estimate:
    """The layer by the vendor's kernel in a 16-bit carrier."""
    moved = CARRIER_BYTES * (work.input_elements + work.weights + work.outputs)
    share, launch = CARRIER_SHARE, CARRIER_LAUNCH
    if work.product.taps > 1:
        share, launch = CARRIER_CONV_SHARE, CARRIER_CONV_LAUNCH
    kernel = work.operations / (share * gpu.fp16_tflops * 1e12) + launch
    return _layer(replace(work, quantized_alone=False), gpu.fp16_tflops, moved, gpu, kernel)


def _layer(work: LayerWork, peak: float, moved: float, gpu: Gpu, kernel: float) -> Estimate:
    """An estimate of a layer whose kernel takes `kernel` seconds if memory keeps up."""
    streaming = MEMORY_SHARE * gpu.bandwidth * 1e9
    quantized = (CARRIER_BYTES + 1) * work.input_elements if work.quantized_alone else 0
    quantize = QUANTIZE_LAUNCH + quantized / streaming if quantized else 0.0
    return Estimate(
        floor=max(work.operations / (peak * 1e12), (moved + quantized) / (gpu.bandwidth * 1e9)),
        predicted=max(kernel, moved / streaming) + quantize,
        operations=work.operations,
        bytes=moved + quantized,
        bound="compute" if kernel >= moved / streaming else "memory",
    )


@dataclass(frozen=True, kw_only=True)
class AttentionWork:
    """One attention: heads over the whole batch, queries, keys, elements of a head."""

    heads: int
    queries: int
    keys: int
    head: int

    @property
    def scores(self) -> float:
        """Number of scores."""
        return float(self.heads) * self.queries * self.keys

    @property
    def elements(self) -> int:
        """Of q, k, v and the output together."""
        return self.heads * (2 * self.queries + 2 * self.keys) * self.head


def carrier_attention(work: AttentionWork, gpu: Gpu) -> Estimate:
    """Flash attention in a 16-bit carrier; heads padded to multiples of 32."""
    operations = 4.0 * work.scores * 32 * ceil(work.head / 32)
    vector = _vector_seconds(work.scores, 1, CARRIER_SCORE_OPERATIONS, gpu)
    return _estimate(operations, gpu.fp16_tflops, ATTENTION_SHARE, CARRIER_BYTES * work.elements, gpu, vector)


def integer_attention(work: AttentionWork, gpu: Gpu) -> Estimate:
    """The int8 kernel: q k^T twice, p v once, heads padded to a power of two; other kernels make its codes."""
    padded = max(32, 2 ** (work.head - 1).bit_length())
    moved = work.elements * (1 + CARRIER_BYTES + 1)
    vector = _vector_seconds(work.scores, 2, INTEGER_SCORE_OPERATIONS, gpu)
    return _estimate(6.0 * work.scores * padded, gpu.int8_tops, ATTENTION_SHARE, moved, gpu, vector)


def _vector_seconds(scores: float, exponentials: int, operations: int, gpu: Gpu) -> float:
    lanes = VECTOR_LANES // 2 if gpu.capability == (8, 0) else VECTOR_LANES
    cycles = max(exponentials / EXPONENTIALS_PER_CYCLE, operations / lanes)
    return scores * cycles / (gpu.multiprocessors * gpu.gigahertz * 1e9)


def _estimate(
    operations: float, peak: float, share: float, moved: float, gpu: Gpu, vector_seconds: float = 0.0
) -> Estimate:
    compute, memory = operations / (peak * 1e12), moved / (gpu.bandwidth * 1e9)
    shares = {"compute": compute / share, "memory": memory / MEMORY_SHARE, "vector": vector_seconds}
    bound = max(shares, key=lambda name: shares[name])
    return Estimate(
        floor=max(compute, memory, vector_seconds),
        predicted=shares[bound],
        operations=operations,
        bytes=moved,
        bound=bound,
    )
