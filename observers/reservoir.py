"""A bounded, seeded sample of the values of a stream of batches."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

CAPACITY = 131_072
"""Values kept for each tensor: 512 KiB; the 99.9th percentile rests on 131 of them."""


class Reservoir(NamedTuple):
    """The sample so far.

    Attributes:
      values: [n <= capacity], float32.
      offered: values offered so far (at most `capacity` a batch), int64 [].
    """

    values: Tensor
    offered: Tensor


def extend(
    reservoir: Reservoir, x: Float[Tensor, "..."], *, seed: int, batch: int, capacity: int = CAPACITY
) -> Reservoir:
    """The reservoir with its fair share of `x` taken in.

    A batch offers at most `capacity` of its values, drawn at random; once the reservoir is full, each batch so far
    holds a part of it in proportion to what it offered: late timesteps are represented like early ones. Choices depend
    on (seed, batch) alone, so that a resumed run makes the same ones.

    Args:
      reservoir: as returned for the batch before.
      x: the batch, any shape and floating dtype.
      seed, batch: of the random choices; `batch` counts up from 0.
      capacity: values kept.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + batch) % 2**63)
    flat = x.detach().flatten()
    kept, offered = reservoir.values.to(x.device), int(reservoir.offered)
    offer = min(flat.shape[0], capacity)
    total = torch.tensor(offered + offer, dtype=torch.int64, device=reservoir.offered.device)
    room = capacity - kept.shape[0]
    share = offer if offer <= room else max(1, room, round(capacity * offer / (offered + offer)))
    if share < flat.shape[0]:
        # With replacement: a permutation of a whole activation costs more than the layer that made it.
        flat = flat[torch.randint(flat.shape[0], (share,), generator=generator).to(x.device)]
    if kept.shape[0] + share > capacity:
        survivors = torch.randperm(kept.shape[0], generator=generator)[: capacity - share]
        kept = kept[survivors.to(x.device)]
    return Reservoir(torch.cat([kept, flat.to(torch.float32)]), total)
