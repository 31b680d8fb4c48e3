"""How good is a quantized network: output SQNR, end-point PSNR, error growth, and what a classifier sees."""

from qdiff_fx.evaluation.chunks import from_bytes, sample_in_chunks
from qdiff_fx.evaluation.classifier import (
    FashionClassifier,
    asked_class_share,
    classify,
    confident_share,
    load_classifier,
)
from qdiff_fx.evaluation.features import FeatureExtractor, FeatureStatistics, fashion_features
from qdiff_fx.evaluation.frechet import (
    DistributionResult,
    frechet_distance,
    inception_style_score,
    measure_distribution,
)
from qdiff_fx.evaluation.intervals import Interval
from qdiff_fx.evaluation.layers import PartSqnr, PartsReport, parts_sqnr
from qdiff_fx.evaluation.pictures import PictureResult, compare_pictures, prompt_score
from qdiff_fx.evaluation.quality import (
    PsnrResult,
    SqnrResult,
    endpoint_psnr,
    output_sqnr,
    trajectory_error,
)
from qdiff_fx.evaluation.sampling import Trajectory, sample_ddim, sample_ddim_guided

__all__ = [
    "DistributionResult",
    "FashionClassifier",
    "FeatureExtractor",
    "FeatureStatistics",
    "Interval",
    "PartSqnr",
    "PartsReport",
    "PictureResult",
    "PsnrResult",
    "SqnrResult",
    "Trajectory",
    "asked_class_share",
    "classify",
    "compare_pictures",
    "confident_share",
    "endpoint_psnr",
    "fashion_features",
    "frechet_distance",
    "from_bytes",
    "inception_style_score",
    "load_classifier",
    "measure_distribution",
    "output_sqnr",
    "parts_sqnr",
    "prompt_score",
    "sample_ddim",
    "sample_ddim_guided",
    "sample_in_chunks",
    "trajectory_error",
]
