"""What a text-to-image pipeline hands to its network for given prompts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdiff_fx.calibration.conditions import Conditions
from qdiff_fx.calibration.progress import progress_bar
from qdiff_fx.calibration.split_call import parameter_names
from qdiff_fx.errors import InputError

_PROMPTS_AT_A_TIME = 8
_REMEDY = "use CalibrationSet.record around your own call of the pipeline"


@dataclass(frozen=True)
class _Call:
    """The first call of the network: its sample [B, C, H, W], and everything after sample and timestep by name."""

    sample: Tensor
    conditions: Mapping[str, Any]


class _FirstCall(Exception):
    """Leaves the pipeline at the first call of its network."""


def conditions_of_prompts(
    pipe: Any,
    prompts: Sequence[str],
    *,
    guidance_scale: float,
    num_inference_steps: int,
    sample_shape: Sequence[int] | None,
    progress: bool | None = False,
) -> tuple[Conditions, tuple[int, ...]]:
    """(conditions of all prompts, both guidance branches where the pipeline runs both; (C, H, W) of the sample).

    The pipeline itself is run up to the first call of its network, so whatever it encodes is there under the name that
    the network knows: contexts, pooled embeddings, size conditions, embedded guidance scales.

    Args:
      pipe: a diffusers pipeline that makes pictures from prompts alone; left as it was.
      prompts: one or more texts.
      guidance_scale, num_inference_steps: handed to the pipeline.
      sample_shape: (C, H, W) to ask for; None leaves the size to the pipeline.
      progress: show a bar; None does so on a terminal.

    Raises: InputError if the prompts are no list of texts, or the pipeline needs more than prompts.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise InputError(f"prompts={prompts!r:.80}: want a list of one or more strings")
    if not callable(pipe) or "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise InputError(f"prompts=: {type(pipe).__name__} takes no prompt; pass encoder_hidden_states= instead")
    call: dict[str, Any] = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    if sample_shape is not None:
        factor = getattr(pipe, "vae_scale_factor", 1)
        call |= {"height": sample_shape[-2] * factor, "width": sample_shape[-1] * factor}
    parts: list[list[dict[str, Any]]] = []
    with _undisturbed(pipe), progress_bar("prompts", total=len(prompts), progress=progress) as bar:
        for start in range(0, len(prompts), _PROMPTS_AT_A_TIME):
            chosen = list(prompts[start : start + _PROMPTS_AT_A_TIME])
            seen = _first_call(pipe, chosen, call)
            parts.append(_branches(seen, len(chosen), type(pipe).__name__))
            bar.update(len(chosen))
    merged = [_joined([part[branch] for part in parts]) for branch in range(len(parts[0]))]
    return (
        Conditions(conditional=merged[-1], unconditional=merged[0] if len(merged) == 2 else None, rows=len(prompts)),
        tuple(seen.sample.shape[1:]),
    )


def _first_call(pipe: Any, prompts: list[str], call: Mapping[str, Any]) -> _Call:
    names, seen = parameter_names(pipe.unet), list[_Call]()

    def leave(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        rest = {key: value for key, value in given.items() if key not in (*names[:2], "return_dict")}
        seen.append(_Call(given[names[0]], rest))
        raise _FirstCall

    generator = torch.Generator().manual_seed(0)
    with pipe.unet.register_forward_pre_hook(leave, prepend=True, with_kwargs=True):
        try:
            pipe(prompt=prompts, generator=generator, output_type="latent", **call)
        except _FirstCall:
            return seen[0]
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"prompts=: {type(pipe).__name__} cannot run on prompts alone ({first}); {_REMEDY}"
            ) from error
    raise InputError(f"prompts=: {type(pipe).__name__} did not call its unet; {_REMEDY}")


def _branches(seen: _Call, count: int, pipeline: str) -> list[dict[str, Any]]:
    """The conditions by branch, unconditional first, as diffusers stacks them."""
    rows = len(seen.sample)
    if rows not in (count, 2 * count):
        raise InputError(
            f"prompts=: {pipeline} makes {rows} rows of {count} prompts, want {count} or twice it; {_REMEDY}"
        )
    return [_rows(seen.conditions, slice(start, start + count), rows, pipeline) for start in range(0, rows, count)]


def _rows(tree: Mapping[str, Any], chosen: slice, rows: int, pipeline: str) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            inner = _rows(value, chosen, rows, pipeline)
            kept |= {name: inner} if inner else {}
        elif isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows:
            kept[name] = value[chosen].to("cpu", copy=True)
        elif value is not None:
            raise InputError(
                f"prompts=: {pipeline} gives {name}, a {type(value).__name__} that is no row each; {_REMEDY}"
            )
    return kept


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: _joined([part[name] for part in parts])
        if isinstance(value, Mapping)
        else torch.cat([part[name] for part in parts])
        for name, value in parts[0].items()
    }


@contextmanager
def _undisturbed(pipe: Any) -> Iterator[None]:
    """A copy of the scheduler and no progress bar inside the block; both as they were after it."""
    scheduler, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
    try:
        pipe.scheduler = type(scheduler).from_config(scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        yield
    finally:
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(**bar)
