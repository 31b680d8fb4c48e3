"""The arms of the ablation table: what rounding to nearest loses, and what each part of the method wins back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdiff_fx.calibration.driver import weight_quantizers
from qdiff_fx.config import QDiffConfig
from qdiff_fx.fake_quantize import ActivationQuantizer, AttentionQuantizer, QuantizerMode
from qdiff_fx.model import PreparedUNet
from qdiff_fx.numerics.spec import weight_spec

STUDY_PRESETS = ("w8a8", "w4a8", "w4a32")


_NOTHING_DECIDED: Mapping[str, Any] = {
    "weight_slack": 0.0,
    "activation_slack": 0.0,
    "equalize": False,
    "bias_correction": False,
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to initialise a quantized network.

    Args:
      name: in JSON and file names.
      title: in tables.
      changes: fields of QDiffConfig that differ from the preset.
    """

    name: str
    title: str
    changes: Mapping[str, Any]

    def config(self, preset: str) -> QDiffConfig:
        """The preset with this arm's changes; bits are never raised, channels never equalised, biases left alone."""
        return QDiffConfig.preset(preset, **{**_NOTHING_DECIDED, **self.changes})


ARMS = (
    Arm(
        name="rtn",
        title="round to nearest: min-max, no split, boundaries quantized",
        changes={
            "split_shortcuts": False,
            "quantize_boundaries": True,
            "weight_observer": "minmax",
            "activation_observer": "minmax",
        },
    ),
    Arm(name="mse", title="MSE ranges, no split", changes={"split_shortcuts": False}),
    Arm(name="mse-split", title="MSE ranges, shortcuts split", changes={}),
)


def pass_activations(prepared: PreparedUNet) -> None:
    """Let activations and attentions through unrounded: a calibrated W4A8 model becomes W4A32."""
    for module in prepared.modules():
        if isinstance(module, (ActivationQuantizer, AttentionQuantizer)):
            module.mode = QuantizerMode.PASS


def widen_weights(prepared: PreparedUNet, bits: int) -> None:
    """Give every narrower weight `bits` bits: a calibrated W4A8 model becomes W8A8 without another calibration.

    For measuring alone: policies in the graph's metadata still tell the old width.
    """
    for quantizer, weight in weight_quantizers(prepared.graph_module):
        if quantizer.spec.bits < bits:
            quantizer.spec = weight_spec(bits)
            quantizer.fit(weight)
