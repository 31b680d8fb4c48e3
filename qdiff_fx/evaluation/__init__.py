"""How good is a quantized network: output SQNR, end-point PSNR, error growth, and what a classifier sees."""

from qdiff_fx.evaluation.classifier import (
    FashionClassifier,
    asked_class_share,
    classify,
    confident_share,
    load_classifier,
)
from qdiff_fx.evaluation.quality import (
    PsnrResult,
    SqnrResult,
    endpoint_psnr,
    output_sqnr,
    trajectory_error,
)
from qdiff_fx.evaluation.sampling import Trajectory, sample_ddim, sample_ddim_guided

__all__ = [
    "FashionClassifier",
    "PsnrResult",
    "SqnrResult",
    "Trajectory",
    "asked_class_share",
    "classify",
    "confident_share",
    "endpoint_psnr",
    "load_classifier",
    "output_sqnr",
    "sample_ddim",
    "sample_ddim_guided",
    "trajectory_error",
]
