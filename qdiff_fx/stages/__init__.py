"""The stages of calibrate(): observation, channel factors, bits, learning, biases, quality target, quality guard."""

from qdiff_fx.stages.biases import correct_biases, layer_input_means
from qdiff_fx.stages.fit import fitting_anew, observe_and_fit
from qdiff_fx.stages.learn import learn_blocks
from qdiff_fx.stages.run import run_stages

__all__ = [
    "correct_biases",
    "fitting_anew",
    "layer_input_means",
    "learn_blocks",
    "observe_and_fit",
    "run_stages",
]
