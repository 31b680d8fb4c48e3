"""Calibration data and the driver that initialises quantizers from it."""

from qdiff_fx.calibration.dataset import CalibrationBatch, CalibrationSet

__all__ = ["CalibrationBatch", "CalibrationSet"]
