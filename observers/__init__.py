"""Observers: they collect what a tensor looks like and choose a grid for it; one observer a file."""

from qdiff_fx.errors import ConfigError
from qdiff_fx.numerics.spec import QuantSpec
from qdiff_fx.observers.base import Observer
from qdiff_fx.observers.minmax import MinMaxObserver
from qdiff_fx.observers.moving_average import MovingAverageObserver
from qdiff_fx.observers.mse import MSEObserver
from qdiff_fx.observers.percentile import PercentileObserver
from qdiff_fx.observers.split import SplitObserver
from qdiff_fx.observers.statistics import ActivationStatistics, TimestepRange

__all__ = [
    "OBSERVERS",
    "ActivationStatistics",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "PercentileObserver",
    "SplitObserver",
    "TimestepRange",
    "create_observer",
]

OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "split": SplitObserver,
}


def create_observer(name: str, spec: QuantSpec, *, seed: int = 0) -> Observer:
    """A fresh observer of the named kind. Raises ConfigError if there is none of that name."""
    if name not in OBSERVERS:
        raise ConfigError(f"observer {name!r}: want one of {', '.join(OBSERVERS)}")
    return OBSERVERS[name](spec, seed=seed)
