"""Storage of narrow integers: 4-bit codes two to a byte, 2-bit channel shifts four to a byte. Plain ATen, traceable."""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

from qdiff_fx.errors import QuantSpecError


def pack_int4(codes: UInt8[Tensor, "..."], *, validate: bool = True) -> UInt8[Tensor, " bytes"]:
    """`codes` two to a byte: flat in memory order of a contiguous tensor, low nibble first, an odd count padded with 0.

    Args:
      codes: any shape, uint8, in 0..15.
      validate: check the values; switch it off in code that is traced.

    Raises:
      QuantSpecError: if the dtype is not uint8 or a code is outside 0..15.
    """
    return _pack(codes, bits=4, validate=validate, what="4-bit codes")


def unpack_int4(packed: UInt8[Tensor, " bytes"], shape: Sequence[int]) -> UInt8[Tensor, "..."]:
    """The uint8 codes of `shape` that `pack_int4` stored. Raises QuantSpecError if the byte count does not fit."""
    return _unpack(packed, tuple(shape), bits=4, what="4-bit codes")


def pack_shifts(shifts: Integer[Tensor, " C"], *, validate: bool = True) -> UInt8[Tensor, " bytes"]:
    """Channel shifts in 0..3 at two bits a channel, lowest bits first. Raises QuantSpecError outside 0..3."""
    if validate and shifts.numel() and not bool(((shifts >= 0) & (shifts <= 3)).all()):
        raise QuantSpecError(f"channel shifts in [{int(shifts.min())}, {int(shifts.max())}]: want 0..3")
    return _pack(shifts.to(torch.uint8), bits=2, validate=False, what="channel shifts")


def unpack_shifts(packed: UInt8[Tensor, " bytes"], channels: int) -> UInt8[Tensor, " C"]:
    """The uint8 shifts of `channels` channels. Raises QuantSpecError if the byte count does not fit."""
    return _unpack(packed, (channels,), bits=2, what="channel shifts")


def _pack(codes: Tensor, *, bits: int, validate: bool, what: str) -> Tensor:
    if codes.dtype != torch.uint8:
        raise QuantSpecError(
            f"{what} of dtype {codes.dtype}: want torch.uint8; signed codes need their zero point added"
        )
    if validate and codes.numel() and int(codes.max()) >= 2**bits:
        raise QuantSpecError(f"{what}: code {int(codes.max())} does not fit {bits} bits: want 0..{2**bits - 1}")
    per_byte = 8 // bits
    flat = codes.reshape(-1)
    columns = torch.nn.functional.pad(flat, (0, -flat.shape[0] % per_byte)).view(-1, per_byte)
    packed = columns[:, 0]
    for position in range(1, per_byte):
        packed = packed | (columns[:, position] << (bits * position))
    return packed


def _unpack(packed: Tensor, shape: tuple[int, ...], *, bits: int, what: str) -> Tensor:
    per_byte = 8 // bits
    count = prod(shape)
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.shape[0] != -(-count // per_byte):
        raise QuantSpecError(
            f"packed {what}: {packed.dtype} {tuple(packed.shape)}, want torch.uint8 [{-(-count // per_byte)}] "
            f"for shape {shape}; the file is damaged or belongs to another layer"
        )
    columns = [(packed >> (bits * position)) & (2**bits - 1) for position in range(per_byte)]
    return torch.stack(columns, dim=1).reshape(-1)[:count].reshape(shape)
