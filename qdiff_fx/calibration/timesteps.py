"""Which steps of a sampling trajectory are kept: pure functions from counts to step indices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from qdiff_fx.errors import ConfigError, InputError

_NORMAL_MEAN = 0.4
_NORMAL_DEVIATION = 0.4


def select_steps(strategy: str, num_steps: int, count: int, *, seed: int = 0) -> tuple[int, ...]:
    """`count` distinct indices in [0, num_steps), ascending; index 0 is the first, noisiest step of the trajectory.

    Args:
      strategy: a key of `STRATEGIES`.
      num_steps: steps of the trajectory with distinct timesteps, >= 1.
      count: steps to keep, in 1..num_steps.
      seed: of the random strategies.

    Raises: ConfigError for an unknown strategy, InputError for a count that does not fit.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy {strategy!r}: want one of {', '.join(STRATEGIES)}")
    if count < 1:
        raise InputError(f"num_timesteps={count}: want 1 or more")
    if count > num_steps:
        raise InputError(
            f"num_timesteps={count}: the sampler has {num_steps} distinct timesteps; "
            f"pass num_timesteps={num_steps} or less, or raise num_inference_steps"
        )
    return STRATEGIES[strategy](num_steps, count, seed)


def uniform(num_steps: int, count: int, seed: int) -> tuple[int, ...]:
    """Evenly spaced, the first and the last step included (one step: the middle one)."""
    del seed
    if count == 1:
        return middle(num_steps, 1, 0)
    # Integer rounding to nearest: gaps differ by at most one, and distinct since num_steps >= count.
    return tuple((2 * i * (num_steps - 1) + count - 1) // (2 * (count - 1)) for i in range(count))


def normal(num_steps: int, count: int, seed: int) -> tuple[int, ...]:
    """Noise levels drawn from N(0.4 T, 0.4 T), clipped to the trajectory, where level 0 is the clean end.

    Source: PTQ4DM (Shang et al., CVPR 2023), section 3.3.3. Departure: a level that was drawn already is drawn again,
    so that every kept step holds the same number of samples.
    """
    generator = torch.Generator().manual_seed(seed)
    levels: dict[int, None] = {}
    # Unclipped draws reach every level with positive probability, but the loop must end also for count == num_steps.
    for _ in range(200):
        drawn = torch.randn(num_steps, generator=generator, dtype=torch.float64)
        noise = ((drawn * _NORMAL_DEVIATION + _NORMAL_MEAN) * num_steps).round().clamp(0, num_steps - 1)
        levels.update(dict.fromkeys(int(level) for level in noise))
        if len(levels) >= count:
            break
    levels.update(dict.fromkeys(range(num_steps)))
    return tuple(sorted(num_steps - 1 - level for level in list(levels)[:count]))


def first(num_steps: int, count: int, seed: int) -> tuple[int, ...]:
    """The first, noisiest steps."""
    del num_steps, seed
    return tuple(range(count))


def middle(num_steps: int, count: int, seed: int) -> tuple[int, ...]:
    """The steps in the middle of the trajectory."""
    del seed
    start = (num_steps - count) // 2
    return tuple(range(start, start + count))


def last(num_steps: int, count: int, seed: int) -> tuple[int, ...]:
    """The last, cleanest steps."""
    del seed
    return tuple(range(num_steps - count, num_steps))


STRATEGIES: Mapping[str, Callable[[int, int, int], tuple[int, ...]]] = {
    "uniform": uniform,
    "normal": normal,
    "first": first,
    "middle": middle,
    "last": last,
}


def equal_count_bins(timesteps: Iterable[float], count: int) -> dict[float, int]:
    """The bin in [0, count) of each distinct timestep: bins hold equally many of them, up to one, in ascending order.

    With at most `count` distinct timesteps each has a bin of its own.
    """
    ordered = sorted(set(timesteps))
    return {timestep: position * count // max(count, len(ordered)) for position, timestep in enumerate(ordered)}
