"""qdiff_fx: post-training quantization of diffusion UNets on torch.fx, down to integer kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdiff_fx import assets, evaluation
    from qdiff_fx.api import calibrate, convert, load, prepare, save, sensitivity
    from qdiff_fx.calibration import CalibrationSet
    from qdiff_fx.calibration.report import CalibrationReport
    from qdiff_fx.config import LayerRule, QDiffConfig
    from qdiff_fx.model import PreparedUNet, QuantizedUNet
    from qdiff_fx.reconstruction import ReconstructionConfig

__version__ = "0.1.0"

__all__ = [
    "CalibrationReport",
    "CalibrationSet",
    "LayerRule",
    "PreparedUNet",
    "QDiffConfig",
    "QuantizedUNet",
    "ReconstructionConfig",
    "assets",
    "calibrate",
    "convert",
    "evaluation",
    "load",
    "prepare",
    "save",
    "sensitivity",
]

_HOMES = {
    "CalibrationReport": "qdiff_fx.calibration.report",
    "CalibrationSet": "qdiff_fx.calibration",
    "LayerRule": "qdiff_fx.config",
    "PreparedUNet": "qdiff_fx.model",
    "QDiffConfig": "qdiff_fx.config",
    "QuantizedUNet": "qdiff_fx.model",
    "ReconstructionConfig": "qdiff_fx.reconstruction",
    "calibrate": "qdiff_fx.api",
    "convert": "qdiff_fx.api",
    "load": "qdiff_fx.api",
    "prepare": "qdiff_fx.api",
    "save": "qdiff_fx.api",
    "sensitivity": "qdiff_fx.api",
}

_SUBPACKAGES = ("assets", "evaluation")

if not TYPE_CHECKING:  # type checkers see the imports above, and a misspelt name

    def __getattr__(name: str) -> Any:
        """A public name, imported at its first use: torch and diffusers take seconds; `qdiff-fx --help` does not."""
        if name in _SUBPACKAGES:
            return import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
