"""The two yardsticks, always reported together, and the growth of the error in between.

Output SQNR compares two networks on the same held-out inputs; end-point PSNR compares the images that they sample
from the same noise. They disagree: weight errors add up over a trajectory, activation errors average out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from qdiff_fx.errors import InputError, NonFiniteError
from qdiff_fx.evaluation.inference import evaluating, output_tensor
from qdiff_fx.numerics.metrics import psnr_db

IMAGE_RANGE = 2.0
"""Data range of PSNR: images live in [-1, 1]."""


class HeldoutBatch(Protocol):
    """A recorded call of the network; `qdiff_fx.calibration`'s batches are such."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Keyword arguments."""

    @property
    def timestep(self) -> float | None:
        """Of all rows; None if the calls have none: these form one group."""


@dataclass(frozen=True, kw_only=True)
class SqnrResult:
    """Output SQNR in dB; inf where the outputs are equal.

    Args:
      pooled_db: one ratio of all signal energy to all noise energy; the noisiest timesteps rule it.
      median_db: the median over timesteps of each timestep's own pooled ratio.
      by_timestep: that ratio by timestep, ascending; -1 stands for calls without a timestep.
      row_energies: (signal, noise) of every row, by timestep.
    """

    pooled_db: float
    median_db: float
    by_timestep: Mapping[float, float]
    row_energies: Mapping[float, Sequence[tuple[float, float]]] = field(default_factory=dict, repr=False, compare=False)

    def median_error_db(self, draws: int = 200, seed: int = 0) -> float:
        """Standard error of `median_db`, from `draws` bootstrap samples of each timestep's rows (Efron, 1979).

        0 where every timestep has one row only, which tells nothing of the spread, and where outputs are equal.
        """
        generator = torch.Generator().manual_seed(seed)
        by_timestep = []
        for rows in self.row_energies.values():
            drawn = torch.randint(len(rows), (draws, len(rows)), generator=generator)
            signal, noise = torch.tensor(rows, dtype=torch.float64)[drawn].sum(dim=1).unbind(dim=1)
            by_timestep.append(10.0 * (signal / noise).log10())
        spread = torch.stack(by_timestep).quantile(0.5, dim=0).std() if by_timestep else torch.zeros(())
        return float(spread) if bool(spread.isfinite()) else 0.0


@dataclass(frozen=True, kw_only=True)
class PsnrResult:
    """End-point PSNR in dB; inf where the images are equal.

    Args:
      median_db: over samples: a single trajectory that tips over to another picture would rule a pooled figure.
      by_sample: in the order of the images.
    """

    median_db: float
    by_sample: tuple[float, ...]


def output_sqnr(
    reference_unet: Callable[..., Any], unet: Callable[..., Any], batches: Iterable[HeldoutBatch]
) -> SqnrResult:
    """How far the outputs of `unet` are from those of `reference_unet` on held-out (x_t, t), both in eval mode.

    Energies are summed in fp64, batch by batch: nothing but two sums a row is kept.

    Raises:
      InputError: if there are no batches or the outputs differ in shape.
      NonFiniteError: if an output holds NaN or infinity; the message names the network and the timestep.
    """
    rows: defaultdict[float, list[tuple[float, float]]] = defaultdict(list)
    with evaluating(reference_unet, unet):
        for batch in batches:
            timestep = -1.0 if batch.timestep is None else float(batch.timestep)
            reference = _finite(output_tensor(reference_unet(*batch.args, **batch.kwargs)), "reference", timestep)
            output = _finite(output_tensor(unet(*batch.args, **batch.kwargs)), "compared", timestep)
            if output.shape != reference.shape:
                raise InputError(
                    f"outputs of shape {list(reference.shape)} and {list(output.shape)} at timestep {timestep:g}: "
                    "want two networks of the same output shape"
                )
            rows[timestep] += zip(_energies(reference), _energies(reference - output), strict=True)
    if not rows:
        raise InputError("no held-out batches: want at least one; a generator can be read only once")
    totals = {timestep: [sum(energies) for energies in zip(*rows[timestep], strict=True)] for timestep in sorted(rows)}
    by_timestep = {timestep: _ratio_db(signal, noise) for timestep, (signal, noise) in totals.items()}
    signal, noise = (sum(energies) for energies in zip(*totals.values(), strict=True))
    return SqnrResult(
        pooled_db=_ratio_db(signal, noise),
        median_db=median(by_timestep.values()),
        by_timestep=by_timestep,
        row_energies={timestep: tuple(rows[timestep]) for timestep in totals},
    )


def endpoint_psnr(reference_images: Tensor, images: Tensor) -> PsnrResult:
    """PSNR of each image against the reference's from the same noise, both clamped to [-1, 1], data range 2.

    Args:
      reference_images, images: [B, C, H, W], sample b from the same noise b; clamped, as a viewer would.

    Raises:
      InputError: if the shapes differ or there are no images.
      NonFiniteError: if an image holds NaN or infinity (clamping would hide infinity).
    """
    if reference_images.shape != images.shape or len(images) == 0:
        raise InputError(
            f"images of shape {list(reference_images.shape)} and {list(images.shape)}: want the same shape"
        )
    for name, batch in (("reference_images", reference_images), ("images", images)):
        if not bool(batch.isfinite().all()):
            raise NonFiniteError(f"{name} hold NaN or infinity: want finite pixels; the sampler diverged")
    by_sample = tuple(
        psnr_db(reference, image, IMAGE_RANGE)
        for reference, image in zip(reference_images.clamp(-1, 1), images.clamp(-1, 1), strict=True)
    )
    return PsnrResult(median_db=median(by_sample), by_sample=by_sample)


def trajectory_error(reference_steps: Sequence[Tensor], steps: Sequence[Tensor]) -> list[float]:
    """Relative error after each sampling step, ||x - x_ref|| / ||x_ref|| over the whole batch, in fp64.

    Args:
      reference_steps, steps: `Trajectory.steps` of two networks from the same noise.

    Raises: InputError if the trajectories differ in length or shape, or are empty.
    """
    if len(reference_steps) != len(steps) or not steps:
        raise InputError(
            f"{len(reference_steps)} and {len(steps)} steps: want the same number; keep_steps=True keeps them"
        )
    errors = []
    for index, (reference, sample) in enumerate(zip(reference_steps, steps, strict=True)):
        if reference.shape != sample.shape:
            raise InputError(f"step {index}: shapes {list(reference.shape)} and {list(sample.shape)}: want the same")
        exact = reference.to(torch.float64)
        errors.append(float((sample.to(torch.float64) - exact).norm() / exact.norm()))
    return errors


def _finite(output: Tensor, name: str, timestep: float) -> Tensor:
    wide = output.to(torch.float64)
    if not bool(wide.isfinite().all()):
        raise NonFiniteError(f"the {name} network's output at timestep {timestep:g} holds NaN or infinity: want finite")
    return wide


def _energies(values: Tensor) -> list[float]:
    """Sum of squares of each row."""
    energies: list[float] = values.square().reshape(len(values), -1).sum(dim=1).tolist()
    return energies


def _ratio_db(signal: float, noise: float) -> float:
    # The conventions of qdiff_fx.numerics.metrics.sqnr_db, for sums that were gathered over many batches.
    if noise == 0.0:
        return math.inf
    return 10.0 * (math.log10(signal) - math.log10(noise)) if signal > 0.0 else -math.inf
