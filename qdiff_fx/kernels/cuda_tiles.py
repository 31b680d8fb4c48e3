"""Block shapes of the Triton kernels: what each architecture may run, and which one a layer gets.

Every entry was compiled for its architecture in every variant that may run with it and keeps all its values in
registers (docs/results-cuda-kernels.md; a slow test compiles them again). Which one a layer gets is timed with
autotune=True; otherwise the shape with the smallest predicted time is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from qdiff_fx.kernels.cuda_gpu import Capability, Gpu

_CACHE_BYTES_PER_CYCLE = 48
"""What one multiprocessor draws from L2, about three quarters of its port."""

_BLOCK_CYCLES = 1500
"""Start and epilogue of a block."""

_STEP_LATENCY = 700
"""Cycles from a load to its use; a pipeline of n stages waits for a (n - 1)th of it a step."""


_WORTH_TRYING = 2.0
"""Times the best prediction: so far the predictions are trusted, further away a shape is not even timed."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One program's share of a layer, and how it is compiled.

    Args:
      rows, outputs: of its output.
      depth: bytes of a weight row that one step reads; packed weights hold two channels in each.
      warps, stages: of the program and of its pipeline.
    """

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int

    @property
    def arguments(self) -> list[int]:
        """As the operators take it."""
        return [self.rows, self.outputs, self.depth, self.warps, self.stages]

    @property
    def shared_memory(self) -> int:
        """Bytes of its pipeline, at most (packed weights come with two tiles of activations)."""
        return (2 * self.rows + self.outputs) * self.depth * self.stages

    def __str__(self) -> str:
        return f"{self.rows}x{self.outputs}x{self.depth}, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True, kw_only=True)
class Product:
    """A layer as the kernel sees it.

    Args:
      rows: output pixels or tokens.
      outputs, depth: output channels, input channels a tap, of one group.
      taps: of the kernel.
      groups: of the convolution.
      packed: whether weights are 4-bit.
    """

    rows: int
    outputs: int
    depth: int
    taps: int = 1
    groups: int = 1
    packed: bool = False


def _tiles(*shapes: tuple[int, int, int, int, int]) -> tuple[Tile, ...]:
    return tuple(
        Tile(rows=rows, outputs=outputs, depth=depth, warps=warps, stages=stages)
        for rows, outputs, depth, warps, stages in shapes
    )


_AMPERE = _tiles(
    (128, 128, 64, 8, 3),
    (128, 64, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 4),
    (64, 64, 128, 4, 3),
    (32, 64, 128, 4, 3),
    (32, 32, 128, 4, 3),
)
_AMPERE_PACKED = _tiles(
    (128, 128, 32, 8, 3),
    (128, 64, 32, 4, 3),
    (64, 128, 32, 4, 3),
    (64, 64, 32, 4, 4),
    (64, 64, 64, 4, 3),
    (32, 64, 64, 4, 3),
    (32, 32, 64, 4, 3),
)
# For GPUs with 48 warps a multiprocessor the compiler gives these fewer registers, and the smaller shapes spill.
_CONSUMER_PACKED = _tiles(
    (128, 128, 32, 8, 3),
    (128, 64, 32, 4, 3),
    (64, 128, 32, 4, 3),
    (64, 64, 64, 4, 3),
)
_HOPPER = _tiles(
    (128, 128, 64, 8, 4),
    (128, 128, 128, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 128, 4, 3),
    (64, 32, 128, 4, 3),
)
_HOPPER_PACKED = _tiles(
    (128, 128, 32, 8, 4),
    (128, 128, 64, 8, 3),
    (128, 64, 32, 4, 4),
    (64, 128, 32, 4, 4),
    (64, 64, 64, 4, 3),
)
# tcgen05 leaves accumulators in its own memory, and everything else that a large epilogue holds in registers.
_BLACKWELL = _tiles(
    (128, 128, 64, 8, 4),
    (128, 64, 64, 8, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 128, 4, 3),
    (64, 32, 128, 4, 3),
)

TILES: Mapping[Capability, Mapping[bool, tuple[Tile, ...]]] = {
    (8, 0): {False: _AMPERE, True: _AMPERE_PACKED},
    (8, 6): {False: _AMPERE, True: _CONSUMER_PACKED},
    (8, 9): {False: _AMPERE, True: _CONSUMER_PACKED},
    (9, 0): {False: _HOPPER, True: _HOPPER_PACKED},
    (10, 0): {False: _BLACKWELL, True: _HOPPER_PACKED},
}
"""By capability, then by whether weights are packed. `layer_tiles` tells which of them a layer may have."""


def interpreter_tile(product: Product) -> Tile:
    """A tile for Triton's interpreter: its time goes by the number of operations, hardly by their width."""
    rows, outputs = (max(16, min(128, 2 ** (size - 1).bit_length())) for size in (product.rows, product.outputs))
    depth = max(32, min(128, 2 ** (product.depth - 1).bit_length()))
    return Tile(rows=rows, outputs=outputs, depth=depth, warps=4, stages=1)


@dataclass(frozen=True, kw_only=True)
class AttentionTile:
    """One program's share of an attention: queries of one head at a time, keys of one step; and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def arguments(self) -> list[int]:
        """As the operator takes it."""
        return [self.queries, self.keys, self.warps, self.stages]

    def __str__(self) -> str:
        return f"{self.queries}x{self.keys}, {self.warps} warps, {self.stages} stages"


def _attention_tiles(*shapes: tuple[int, int, int, int]) -> tuple[AttentionTile, ...]:
    return tuple(
        AttentionTile(queries=queries, keys=keys, warps=warps, stages=stages) for queries, keys, warps, stages in shapes
    )


ATTENTION_TILES: Mapping[int, tuple[AttentionTile, ...]] = {
    64: _attention_tiles((64, 64, 8, 3)),
    128: _attention_tiles((64, 64, 8, 3)),
    256: _attention_tiles((64, 64, 8, 2)),
}
"""Shapes of the attention kernel, the one that is taken without timings first, by elements of a head that it holds."""

_WIDE_ATTENTION: Mapping[bool, tuple[AttentionTile, ...]] = {
    True: _attention_tiles((64, 32, 8, 1)),
    False: _attention_tiles((32, 32, 4, 1)),
}
"""For heads of up to 512, by whether the GPU is an sm_80: with an added mask 64 queries spill on sm_90, 32 on sm_80.

32 queries take Ampere's instruction everywhere.
"""

_INTERPRETED_ATTENTION = (AttentionTile(queries=32, keys=32, warps=4, stages=1),)


def attention_tiles(head: int, gpu: Gpu | None) -> tuple[AttentionTile, ...]:
    """What heads of this size may run with; a small tile for Triton's interpreter (no GPU)."""
    if gpu is None:
        return _INTERPRETED_ATTENTION
    wide = _WIDE_ATTENTION[gpu.capability == (8, 0)]
    return next((tiles for size, tiles in ATTENTION_TILES.items() if head <= size), wide)


def layer_tiles(product: Product, gpu: Gpu) -> tuple[Tile, ...]:
    """The tiles of `gpu`'s table that keep the layer's values in registers.

    Packed weights of several groups, or of rows that cannot be read 16 bytes at a time, need more of them for
    addresses and masks: the large tiles spill.
    """
    tiles = TILES[gpu.capability][product.packed]
    if product.packed and (product.groups > 1 or product.depth % 32):
        return tuple(tile for tile in tiles if max(tile.rows, tile.outputs) <= 64)
    return tiles


def ranked_tiles(product: Product, gpu: Gpu) -> list[Tile]:
    """The tiles of `gpu`'s table worth trying, the one with the smallest predicted time first."""
    cycles = {tile: tile_cycles(product, tile, gpu) for tile in layer_tiles(product, gpu)}
    ranked = sorted(cycles, key=lambda tile: cycles[tile])
    return [tile for tile in ranked if cycles[tile] <= _WORTH_TRYING * cycles[ranked[0]]]


def tile_cycles(product: Product, tile: Tile, gpu: Gpu) -> float:
    """Predicted cycles of the layer: blocks a multiprocessor, each bound by tensor cores, by L2 or by latency."""
    length = -(-product.depth // 2) if product.packed else product.depth
    steps = product.taps * ceil(length / tile.depth)
    products_a_cycle = gpu.int8_tops * 1e3 / (2 * gpu.multiprocessors * gpu.gigahertz)
    codes = 2 if product.packed else 1
    step = max(
        tile.rows * tile.outputs * tile.depth * codes / products_a_cycle,
        (tile.rows * codes + tile.outputs) * tile.depth / _CACHE_BYTES_PER_CYCLE,
    )
    blocks = ceil(product.rows / tile.rows) * ceil(product.outputs / tile.outputs) * product.groups
    share = ceil(blocks / gpu.multiprocessors)
    resident = max(1, min(share, gpu.shared_memory // tile.shared_memory, 16 // tile.warps))
    together = max(resident * step, _STEP_LATENCY / max(1, tile.stages - 1)) * steps + _BLOCK_CYCLES
    return ceil(share / resident) * together
