"""What calibration found."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qdiff_fx.calibration.channels import left_alone, widest_channels
from qdiff_fx.errors import QDiffWarning

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """Grids and ranges of every quantizer.

    Args:
      samples: rows that were observed.
      timesteps: distinct noise levels among them, ascending.
      fingerprint: SHA-256 of the calibration set.
      scheduler: noise process that the set was collected with; {} where the set does not tell.
      seconds: wall time.
      quantizers: a row an activation quantizer: name, bits, scale, zero_point, minimum, maximum, channel_maxima,
        by_timestep ([timestep, minimum, maximum] each).
      maxima: largest |x| of every tensor that was observed, by name; kept for inputs that went to the carrier type too.
      offsets: the energy of those with positions over the variance of their channels, 1 without constants in them.
      layers: a row a layer: name, operator, weight_bits, activation_bits, reason.
      reconstruction: a row a block and phase: name, iterations, losses before and after, seconds; empty without.
      factors: a row a tensor whose channel factors were searched: layers, exponent (None: off), shifted, gain_db.
      raises: a row a quantizer that got more than the config's width: kind, layers, bits (None: carrier), reason.
      corrected_biases: how many layers got a bias that makes up for what rounding their weights to nearest does to the
        mean of their outputs.
      sensitivity: a row a layer and attention: name and error, the predicted energy of the output error that its
        quantizers cause alone at their final widths, relative to the output's; empty where nothing was to be decided
        and the quality is accepted.
      quality: output SQNR on held-out samples: samples, pooled_db, median_db, by_timestep, accepted (at least 10 dB).
    """

    samples: int
    timesteps: tuple[float, ...]
    fingerprint: str
    seconds: float
    quantizers: tuple[dict[str, Any], ...]
    layers: tuple[dict[str, Any], ...]
    maxima: dict[str, float] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)
    reconstruction: tuple[dict[str, Any], ...] = ()
    factors: tuple[dict[str, Any], ...] = ()
    raises: tuple[dict[str, Any], ...] = ()
    corrected_biases: int = 0
    sensitivity: tuple[dict[str, Any], ...] = ()
    quality: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """What goes into a saved model's plan."""
        return {
            "samples": self.samples,
            "timesteps": list(self.timesteps),
            "fingerprint": self.fingerprint,
            "scheduler": self.scheduler,
            "maxima": self.maxima,
            "offsets": self.offsets,
            "raises": list(self.raises),
            "channels": widest_channels(self.factors),
            "left_alone": left_alone(self.factors),
            "quality": self.quality,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def quality_line(summary: Mapping[str, Any]) -> str:
    """One line on the quality that a stored model's plan records."""
    quality = _measured_quality(summary)
    if quality is None:
        return "output quality was not measured"
    figures = [quality.get(name) for name in ("pooled_db", "median_db")]
    pooled, median = ("inf" if value is None else f"{value:.1f}" for value in figures)
    verdict = "" if quality.get("accepted") else " (doubtful)"
    return f"output SQNR on held-out inputs: {pooled} dB pooled, {median} dB in the median over timesteps{verdict}"


def tell_quality(folder: Path, summary: Mapping[str, Any], *, stacklevel: int) -> None:
    """Log the quality of the model that was loaded from `folder`; warn of one that calibrate() warned of."""
    quality, line = _measured_quality(summary), f"{folder}: {quality_line(summary)}"
    if quality is None or quality.get("accepted"):
        logger.info(line)
    else:
        warnings.warn(f"{line}; its pictures are likely ruined", QDiffWarning, stacklevel=stacklevel)


def _measured_quality(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    quality = summary.get("quality")
    return quality if isinstance(quality, Mapping) and "samples" in quality else None
