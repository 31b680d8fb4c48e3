"""Find attentions whose quantized probabilities no longer are probabilities, and keep these in the carrier type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qdiff_fx.allocation.probe import Probe, flat_inputs, spread_rows
from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.fake_quantize import AttentionQuantizer, QuantizerMode, preserved_modes, set_mode
from qdiff_fx.graph.signature import CallSignature
from qdiff_fx.numerics.affine import fake_quantize
from qdiff_fx.numerics.attention import attention_probabilities, attention_scale, probability_step
from qdiff_fx.numerics.spec import QuantSpec
from qdiff_fx.passes.prepare.raises import Raise

RUINED_DB = 10.0
"""Rows whose sums keep less than this, 1 against the error's root mean square, are lost."""

_RUINED = 10 ** (-RUINED_DB / 20)
_MAPS = 4


@torch.no_grad()
def ruined_probabilities(
    graph_module: fx.GraphModule,
    signature: CallSignature,
    data: CalibrationSet,
    *,
    samples: int = 6,
    seed: int = 0,
) -> tuple[Raise, ...]:
    """Raises for the attentions whose probabilities do not survive their grid, by full-precision calls.

    The grid's step is 1 / (2^bits - 1) for every attention. Where attention is flat over more keys than that, each
    probability is under half a step: all of them become 0, and so does the output. A row of probabilities sums to 1,
    so the sum's error is the relative error of the output along the mean of v, whatever v is. Looked at by sample: a
    single noise level that is ruined ruins the picture.

    Args:
      samples: rows of `data`, evenly over the timesteps; one forward pass each, with up to 4 attention maps looked at.
    """
    errors: dict[str, tuple[float, float]] = {}

    class Watch(Probe):
        def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            module = self.fetch_attr(target)
            grid = module.probabilities if isinstance(module, AttentionQuantizer) else None
            if grid is not None and 0.5 * args[1].shape[-2] / grid.qmax > _RUINED:  # half a step a key can lose a row
                seen = row_sum_error(grid, *args, **kwargs)
                errors[str(target)] = max(errors.get(str(target), seen), seen)
            return super().call_module(target, args, kwargs)

    if not any(isinstance(module, AttentionQuantizer) for module in graph_module.modules()):
        return ()
    watch = Watch(graph_module, on_weight=lambda _, __, weight: weight, on_input=lambda _, __, x: x)
    parameter = next(graph_module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with preserved_modes(graph_module):
        set_mode(graph_module, QuantizerMode.PASS)
        for row in spread_rows(data, samples, seed):
            watch.run(*flat_inputs(data, row.reshape(1), signature, device))
            if not errors:
                return ()  # too few keys in every attention
    return tuple(_raise(graph_module, target, *seen) for target, seen in errors.items() if seen[0] > _RUINED)


def row_sum_error(
    probabilities: QuantSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[float, float]:
    """(root mean square of the error, mean of the quantized sum) of the rows of up to 4 attention maps, evenly taken.

    Args:
      probabilities: their grid.
      query, key, value, mask, is_causal, scale: as in scaled_dot_product_attention.
    """
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])  # type: ignore[no-untyped-call]
    query, key = (x.expand(*lead, *x.shape[-2:]) for x in (query, key))
    length, keys = query.shape[-2], key.shape[-2]
    if mask is not None:
        mask = mask.expand(*lead, length, keys)
    step = probability_step(probabilities).to(query.device)
    sums = []
    for flat in torch.linspace(0, lead.numel() - 1, min(_MAPS, lead.numel())).round().to(torch.int64):
        index = torch.unravel_index(flat, lead)  # a map at a time: they are large
        scores = query[index] @ key[index].transpose(-1, -2)
        weights = attention_probabilities(
            scores, None if mask is None else mask[index], is_causal, attention_scale(query, scale)
        )
        sums.append(fake_quantize(weights, step, 0, probabilities).sum(-1))
    found = torch.cat(sums)
    return float((found - 1.0).square().mean().sqrt()), float(found.mean())


def _raise(graph_module: fx.GraphModule, target: str, error: float, mean: float) -> Raise:
    quantizer = graph_module.get_submodule(target)
    assert isinstance(quantizer, AttentionQuantizer)
    assert quantizer.probabilities is not None
    return Raise(
        kind="softmax",
        target=target,
        layers=(quantizer.name,),
        bits=None,
        reason=f"ruined: at one noise level its {quantizer.probabilities.bits}-bit probabilities sum to {mean:.2f} a "
        f"row instead of 1 (error {error:.2f})",
    )
