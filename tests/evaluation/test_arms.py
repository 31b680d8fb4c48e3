"""Every arm is what its name says, and one calibration serves its presets."""

from __future__ import annotations

import torch

import qdiff_fx
from qdiff_fx.evaluation.arms import ARMS, STUDY_PRESETS, pass_activations, widen_weights
from qdiff_fx.fake_quantize import QuantizerMode
from subjects import unconditional_unet

CALLS = [((torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(t)), t), {}) for t in range(0, 900, 100)]


def test_no_arm_spends_anything_beyond_its_preset() -> None:
    for arm in ARMS:
        for preset in STUDY_PRESETS:
            config = arm.config(preset)
            assert (config.weight_slack, config.activation_slack, config.equalize) == (0.0, 0.0, False)


def test_one_calibration_serves_all_presets_of_an_arm() -> None:
    unet, arm = unconditional_unet(), ARMS[-1]
    x = CALLS[0][0][0]
    outputs, prepared = {}, {}
    for preset in STUDY_PRESETS:
        prepared[preset] = qdiff_fx.prepare(unet, arm.config(preset))
        qdiff_fx.calibrate(prepared[preset], CALLS, progress=False)
        outputs[preset] = prepared[preset](x, 100, return_dict=False)[0]
    shared = prepared["w4a8"]
    pass_activations(shared)
    assert torch.equal(shared(x, 100, return_dict=False)[0], outputs["w4a32"])
    shared.set_mode(QuantizerMode.QUANTIZE)
    widen_weights(shared, 8)
    assert torch.equal(shared(x, 100, return_dict=False)[0], outputs["w8a8"])
