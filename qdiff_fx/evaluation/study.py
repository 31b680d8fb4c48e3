"""One yardstick for many arms: full-precision trajectories from fixed noise, run once, against those of others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.calibration.timesteps import select_steps
from qdiff_fx.errors import InputError
from qdiff_fx.evaluation.inference import evaluating, output_tensor
from qdiff_fx.evaluation.quality import PsnrResult, SqnrResult, endpoint_psnr, output_sqnr, trajectory_error
from qdiff_fx.evaluation.sampling import Trajectory

Network = Callable[..., Any]
Sampler = Callable[[Network], Trajectory]
"""Samples with a network from noise that never changes, keeping the steps."""


@dataclass(frozen=True, kw_only=True)
class HeldoutCall:
    """A call of the full-precision network on its own trajectory, and what it returned.

    Args:
      args, kwargs: as the sampler called it.
      timestep: of all rows; None if it has none.
      output: the prediction, [B, C, H, W].
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    timestep: float | None
    output: Tensor


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What quantization did to a network.

    Args:
      sqnr: of the outputs on held-out (x_t, t).
      psnr: of the images from the same noise.
      error_by_step: relative error of the sample after each step.
      images: [B, C, H, W], not clamped.
      seconds_per_step: of a call of the network while it sampled, the median: on the wall clock, as it was handed in
        (compiled or not).
    """

    sqnr: SqnrResult
    psnr: PsnrResult
    error_by_step: tuple[float, ...]
    images: Tensor
    seconds_per_step: float


class Yardstick:
    """Both yardsticks against one network; its trajectories are run once and serve every arm.

    Args:
      reference: the full-precision network.
      sample: the sampler; the inputs that it gives to `reference` are the held-out set, so its noise must come from
        another seed than the calibration set's.
      num_timesteps: calls kept as held-out set, evenly spaced, the first and the last included.
      num_calls: calls of the network that a sampling takes, for the first bar's ETA; None if not known.
      progress: show bars; None does so on a terminal.

    Raises: InputError if the sampler keeps no steps.
    """

    def __init__(
        self,
        reference: Network,
        sample: Sampler,
        *,
        num_timesteps: int = 20,
        num_calls: int | None = None,
        progress: bool | None = None,
    ) -> None:
        self._sample, self._progress = sample, progress
        calls: list[HeldoutCall] = []
        with _Watched(reference, "full precision", progress, total=num_calls, on_call=calls.append) as watched:
            self.reference: Trajectory = sample(watched)
        self.seconds_per_step: float = watched.seconds_per_call
        if not self.reference.steps:
            raise InputError("the sampler keeps no steps; pass keep_steps=True to it")
        kept = select_steps("uniform", len(calls), min(num_timesteps, len(calls)), seed=0)
        self._calls_per_sample = len(calls)
        self.calls: tuple[HeldoutCall, ...] = tuple(calls[index] for index in kept)

    @property
    def rows(self) -> int:
        """Held-out rows."""
        return sum(len(call.output) for call in self.calls)

    def output_sqnr(self, network: Network, description: str = "output SQNR") -> SqnrResult:
        """SQNR of the outputs of `network` on the held-out calls."""
        outputs = iter([call.output for call in self.calls])
        with _Watched(network, description, self._progress, total=len(self.calls)) as watched, evaluating(network):
            return output_sqnr(lambda *args, **kwargs: next(outputs), watched, self.calls)

    def measure(self, network: Network, description: str = "measure") -> Measurement:
        """Both yardsticks and the growth of the error for `network`, which is called like the reference."""
        sqnr = self.output_sqnr(network, f"{description}: outputs")
        with _Watched(network, f"{description}: samples", self._progress, total=self._calls_per_sample) as watched:
            trajectory = self._sample(watched)
        return Measurement(
            sqnr=sqnr,
            psnr=endpoint_psnr(self.reference.images, trajectory.images),
            error_by_step=tuple(trajectory_error(self.reference.steps, trajectory.steps)),
            images=trajectory.images,
            seconds_per_step=watched.seconds_per_call,
        )


class _Watched:
    """A network as a plain callable that moves a progress bar, and hands on its calls where somebody asks."""

    def __init__(
        self,
        network: Network,
        description: str,
        progress: bool | None,
        *,
        total: int | None = None,
        on_call: Callable[[HeldoutCall], None] | None = None,
    ) -> None:
        self._network, self._on_call = network, on_call
        self._bar = progress_bar(description, total=total, progress=progress)
        self._evaluating = evaluating(network)
        self._seconds: list[float] = []

    @property
    def seconds_per_call(self) -> float:
        """Median over the calls so far; 0 if there were none."""
        return median(self._seconds or [0.0])

    def __enter__(self) -> _Watched:
        self._evaluating.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()
        self._evaluating.__exit__(*exception)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        started = time.perf_counter()
        output = output_tensor(self._network(*args, **kwargs))
        if output.is_cuda:
            torch.cuda.synchronize(output.device)
        self._seconds.append(time.perf_counter() - started)
        if self._on_call is not None:
            timestep = next(_scalars(args[1:], kwargs), None)
            self._on_call(HeldoutCall(args=args, kwargs=kwargs, timestep=timestep, output=output))
        self._bar.update(1)
        return (output,)


def _scalars(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[float]:
    """Numbers and tensors of one value: the timestep is the first of them behind the sample."""
    for value in (*args, *(kwargs[name] for name in kwargs if name != "return_dict")):
        if (isinstance(value, Tensor) and value.numel() == 1) or type(value) in (int, float):
            yield float(value)
