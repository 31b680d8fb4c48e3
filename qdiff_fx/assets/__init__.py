"""The two small diffusion models that travel with the package (docs/model-card.md)."""

from qdiff_fx.assets.conditional import ConditionalPipeline
from qdiff_fx.assets.models import (
    CLASS_NAMES,
    classifier_path,
    conditional_path,
    load_conditional,
    load_unconditional,
    unconditional_path,
)
from qdiff_fx.assets.sampling import denoise, guided_prediction

__all__ = [
    "CLASS_NAMES",
    "ConditionalPipeline",
    "classifier_path",
    "conditional_path",
    "denoise",
    "guided_prediction",
    "load_conditional",
    "load_unconditional",
    "unconditional_path",
]
