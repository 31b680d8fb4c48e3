"""Block shapes of the Triton kernels: what each architecture may run, and which one a layer gets.

Every entry was compiled for its architecture in every variant that may run with it and keeps all its values in
registers (docs/results-cuda-kernels.md; a slow test compiles them again). Which one a layer gets is timed with
autotune=True; otherwise the shape with the smallest predicted time is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, prod

from qdiff_fx.kernels.cuda_gpu import Capability, Gpu


@dataclass(frozen=True, kw_only=True)
class _Costs:
    """What a kernel's time is made of on one multiprocessor, in cycles of the boost clock.

    Fitted to the times of 64 layers of Stable Diffusion 1.5 and XL with up to 35 tiles each on an H100
    (docs/decisions/034-copy-engine.md); other GPUs have their own peaks and are assumed to be alike otherwise.

    Args:
      tensor_cores: share of their peak that a step reaches.
      cache: bytes a cycle from L2.
      latency: from a load to its use; a pipeline of n stages waits for a (n - 1)th of it a step.
      step: what a step costs beside its products, if no other block fills the gap.
      block, element: start and epilogue of a block, once and for each of its outputs.
      launch: start and end of the kernel.
      unpacking: factor on the products of packed weights.
      unpacked: for each of their bytes and threads.
      split, shared: a split layer's kernel more, and for each of its outputs.
    """

    tensor_cores: float
    cache: float
    latency: float
    step: float
    block: float
    element: float
    launch: float
    unpacking: float
    unpacked: float
    split: float = 0.0
    shared: float = 0.0


_BY_THREADS = _Costs(
    tensor_cores=0.49,
    cache=33,
    latency=1370,
    step=140,
    block=630,
    element=0.12,
    launch=1970,
    unpacking=1.27,
    unpacked=0.46,
)
_BY_DESCRIPTORS = _Costs(
    tensor_cores=0.79,
    cache=51,
    latency=3150,
    step=235,
    block=2140,
    element=0.19,
    launch=280,
    unpacking=1.18,
    unpacked=0.54,
    split=8450,
    shared=3.0,
)

_REGISTERS = 65536
"""Of a multiprocessor; a thread has those of its outputs and the rest."""

_OTHER_REGISTERS = {False: 95, True: 60}
"""Of a thread, by whether it computes no addresses of loads."""

_LONG_STEP = 128
"""Bytes of int8 channels."""

_WORTH_TRYING = 1.6
"""Times the best prediction: so far the predictions are trusted, further away a shape is not even timed."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One program's share of a layer, and how it is compiled.

    Args:
      rows, outputs: of its output.
      depth: bytes of a weight row that one step reads; packed weights hold two channels in each.
      warps, stages: of the program and of its pipeline.
      descriptors: whether the copy engine fetches tiles (`triton_kernels.image_layer`) instead of the threads.
      split: programs that share the sum of one tile; more than one with descriptors only.
    """

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False
    split: int = 1

    @property
    def arguments(self) -> list[int]:
        """As the operators take it."""
        return [self.rows, self.outputs, self.depth, self.warps, self.stages, int(self.descriptors), self.split]

    def shared_memory(self, packed: bool) -> int:
        """Bytes of its pipeline, at most; packed weights come with two tiles of activations."""
        return (self.rows * (2 if packed else 1) + self.outputs) * self.depth * self.stages

    def __str__(self) -> str:
        name = f"{self.rows}x{self.outputs}x{self.depth}, {self.warps} warps, {self.stages} stages"
        name += ", descriptors" if self.descriptors else ""
        return f"{name}, split {self.split}" if self.split > 1 else name


@dataclass(frozen=True, kw_only=True)
class Product:
    """A layer as the kernel sees it.

    Args:
      rows: output pixels or tokens.
      outputs, depth: output channels, input channels a tap, of one group.
      taps: of the kernel.
      groups: of the convolution.
      packed: whether weights are 4-bit.
      stride_one: whether neighbouring outputs see neighbouring inputs.
    """

    rows: int
    outputs: int
    depth: int
    taps: int = 1
    groups: int = 1
    packed: bool = False
    stride_one: bool = True

    @property
    def length(self) -> int:
        """Bytes of a tap in a weight's row."""
        return ceil(self.depth / 2) if self.packed else self.depth

    @property
    def describable(self) -> bool:
        """Whether a descriptor can tell the copy engine where its tiles lie: rows of whole 16 bytes, no groups."""
        return self.groups == 1 and self.stride_one and self.depth % (32 if self.packed else 16) == 0


def _tiles(*shapes: tuple[int, int, int, int, int]) -> tuple[Tile, ...]:
    return tuple(
        Tile(rows=rows, outputs=outputs, depth=depth, warps=warps, stages=stages)
        for rows, outputs, depth, warps, stages in shapes
    )


def _described(
    *shapes: tuple[int, int, int, int, int], splits: Mapping[tuple[int, int, int, int, int], tuple[int, ...]]
) -> tuple[Tile, ...]:
    """Tiles by descriptors: whole ones, then some of them split."""
    whole = [replace(tile, descriptors=True) for tile in _tiles(*shapes)]
    divided = [replace(_tiles(shape)[0], descriptors=True, split=parts) for shape in splits for parts in splits[shape]]
    return (*whole, *divided)


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
    (128, 64, 64, 4, 4),
    (128, 128, 32, 8, 4),
    (128, 128, 64, 8, 3),
    (128, 64, 32, 4, 4),
    (64, 128, 32, 4, 4),
    (64, 64, 64, 4, 3),
)
# What the copy engine fetches for; it knows no groups and no strides. Of equal predictions the first is taken.
_HOPPER_DESCRIPTORS = _described(
    (128, 128, 128, 8, 3),
    (64, 128, 128, 4, 4),
    (128, 64, 128, 4, 4),
    (64, 64, 128, 4, 6),
    (256, 64, 128, 8, 4),
    (128, 128, 128, 8, 4),
    (128, 64, 64, 4, 6),
    splits={(64, 64, 128, 4, 6): (2, 4)},
)
_HOPPER_PACKED_DESCRIPTORS = _described(
    (128, 128, 64, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 6),
    splits={(64, 64, 64, 4, 6): (2, 4, 8), (128, 64, 64, 4, 4): (2,)},
)
# tcgen05 leaves accumulators in its own memory, and everything else that a large epilogue holds in registers.
_BLACKWELL = _tiles(
    (128, 128, 64, 8, 4),
    (128, 64, 64, 8, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 128, 4, 3),
    (64, 32, 128, 4, 3),
)

_BLACKWELL_PACKED = _HOPPER_PACKED[1:]

TILES: Mapping[Capability, Mapping[bool, tuple[Tile, ...]]] = {
    (8, 0): {False: _AMPERE, True: _AMPERE_PACKED},
    (8, 6): {False: _AMPERE, True: _CONSUMER_PACKED},
    (8, 9): {False: _AMPERE, True: _CONSUMER_PACKED},
    (9, 0): {False: _HOPPER, True: _HOPPER_PACKED},
    (10, 0): {False: _BLACKWELL, True: _BLACKWELL_PACKED},
}
"""By capability, then by whether weights are packed. `layer_tiles` tells which of them a layer may have."""

DESCRIPTOR_TILES: Mapping[Capability, Mapping[bool, tuple[Tile, ...]]] = {
    (9, 0): {False: _HOPPER_DESCRIPTORS, True: _HOPPER_PACKED_DESCRIPTORS}
}
"""Likewise, for GPUs whose copy engine fetches tiles and on which that was measured."""


def interpreter_tile(product: Product) -> Tile:
    """A tile for Triton's interpreter: its time goes by the number of operations, hardly by their width."""
    rows, outputs = (max(16, min(128, 2 ** (size - 1).bit_length())) for size in (product.rows, product.outputs))
    depth = max(32, min(128, 2 ** (product.depth - 1).bit_length()))
    return Tile(rows=rows, outputs=outputs, depth=depth, warps=4, stages=1)


@cache
def pixel_block(rows: int, images: int, height: int, width: int) -> tuple[int, int, int]:
    """`rows` output pixels as images x height x width, powers of two, with the fewest outside; wide, then tall.

    Of several images only where each is whole in the block.

    Args:
      images, height, width: of the output.
    """
    powers = [2**exponent for exponent in reversed(range(rows.bit_length()))]
    blocks = [
        (rows // (tall * wide), tall, wide)
        for wide in powers
        for tall in powers
        if tall * wide == rows or (tall * wide < rows and tall >= height and wide >= width)
    ]
    sizes = (images, height, width)
    return min(
        blocks, key=lambda block: prod(ceil(size / part) * part for size, part in zip(sizes, block, strict=True))
    )


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
    """The tiles of `gpu`'s tables that keep the layer's values in registers.

    Those with descriptors, where the layer can have them: packed weights must end where a step does, since the other
    half of the channels begins there; int8 ones take short steps only where long ones would reach past the channels.
    Packed weights of several groups, or of rows that cannot be read 16 bytes at a
    time, need more registers for addresses and masks: the large tiles spill.
    """
    if product.describable:
        described = DESCRIPTOR_TILES.get(gpu.capability, {}).get(product.packed, ())
        if product.packed:
            fitting = tuple(tile for tile in described if product.length % tile.depth == 0)
        else:
            fitting = tuple(tile for tile in described if tile.depth >= _LONG_STEP or product.length % _LONG_STEP)
        if fitting:
            return fitting
    tiles = TILES[gpu.capability][product.packed]
    if product.packed and (product.groups > 1 or product.depth % 32):
        return tuple(tile for tile in tiles if max(tile.rows, tile.outputs) <= 64)
    return tiles


def ranked_tiles(product: Product, gpu: Gpu) -> list[Tile]:
    """The tiles worth trying, the one with the smallest predicted time first."""
    cycles = {tile: tile_cycles(product, tile, gpu) for tile in layer_tiles(product, gpu)}
    ranked = sorted(cycles, key=lambda tile: cycles[tile])
    return [tile for tile in ranked if cycles[tile] <= _WORTH_TRYING * cycles[ranked[0]]]


def tile_cycles(product: Product, tile: Tile, gpu: Gpu) -> float:
    """Predicted cycles of the layer: waves of blocks, each bound by tensor cores, by L2 or by latency."""
    costs = _BY_DESCRIPTORS if tile.descriptors else _BY_THREADS
    codes = 2 if product.packed else 1
    steps = ceil(product.taps * ceil(product.length / tile.depth) / tile.split)
    products_a_cycle = gpu.int8_tops * 1e3 / (2 * gpu.multiprocessors * gpu.gigahertz)
    compute = tile.rows * tile.outputs * tile.depth * codes / products_a_cycle / costs.tensor_cores
    if product.packed:
        compute = costs.unpacking * compute + costs.unpacked * tile.outputs * tile.depth * codes / (32 * tile.warps)
    cache = (tile.rows * codes + tile.outputs) * tile.depth / costs.cache
    alone = max(compute + costs.step, costs.latency / max(1, tile.stages - 1))

    def wave(resident: int) -> float:
        step = max(resident * compute, resident * cache, alone)
        return steps * step + costs.block + costs.element * tile.rows * tile.outputs * resident

    blocks = ceil(product.rows / tile.rows) * ceil(product.outputs / tile.outputs) * product.groups * tile.split
    resident = _resident(tile, product.packed, gpu)
    full, rest = divmod(ceil(blocks / gpu.multiprocessors), resident)
    cycles = costs.launch + full * wave(resident) + (wave(rest) if rest else 0.0)
    if tile.split > 1:
        cycles += costs.split + costs.shared * product.rows * product.outputs * product.groups / gpu.multiprocessors
    return cycles


def _resident(tile: Tile, packed: bool, gpu: Gpu) -> int:
    """Blocks that one multiprocessor holds, by shared memory and by registers."""
    own = tile.rows * tile.outputs / (32 * tile.warps) + _OTHER_REGISTERS[tile.descriptors]
    registers = 8 * ceil(min(255, own) / 8) * 32 * tile.warps
    return max(1, min(gpu.shared_memory // tile.shared_memory(packed), _REGISTERS // registers, 4))
