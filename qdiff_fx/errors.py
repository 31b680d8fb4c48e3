"""Typed errors: every message names the node, file or argument, the value seen, the value wanted and the remedy."""


class QDiffError(Exception):
    """Base class of every error that qdiff_fx raises on purpose."""


class ConfigError(QDiffError, ValueError):
    """A configuration value is unknown, out of range or contradicts another."""


class InputError(QDiffError, ValueError):
    """A call's arguments do not fit the model or the API."""


class QuantSpecError(QDiffError, ValueError):
    """A quantization grid or its parameters are invalid (bits, scale, zero point)."""


class NonFiniteError(QDiffError, ValueError):
    """NaN or infinity was found in weights, activations or outputs."""


class CaptureError(QDiffError, RuntimeError):
    """A module could not be captured as a torch.fx graph."""


class PatternError(QDiffError, ValueError):
    """A pass met a graph that it cannot rewrite and must not skip in silence."""


class CalibrationError(QDiffError, RuntimeError):
    """Calibration data is missing, empty or belongs to another model."""


class QualityError(QDiffError, RuntimeError):
    """The quantized output is ruined, and nobody said that this is accepted."""


class ConversionError(QDiffError, RuntimeError):
    """A prepared model cannot be converted as asked."""


class CheckpointError(QDiffError, RuntimeError):
    """A stored model, calibration set or checkpoint is missing, damaged or of another version."""


class DiskError(CheckpointError):
    """A file cannot be written: the disk is full, or the folder is not writable."""


class BackendError(QDiffError, RuntimeError):
    """A backend is unknown or cannot run on this machine."""


class QDiffWarning(UserWarning):
    """Something was asked for that has no effect, or a result whose quality is in doubt."""
