"""Unit, reduction and scale of a signal, for figures and dashboards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stabmon.signals.base import SIGNALS


@dataclass(frozen=True)
class Presentation:
    """Unit, reduction and scale that a signal is drawn with."""

    unit: str
    """Unit of the values; the signal's own name where it is not registered."""
    reduction: Literal["mean", "max"] = "mean"
    """Reduction over the heads of a layer."""
    limits: tuple[float, float] | tuple[None, None] = (None, None)
    """Smallest and largest value of the scale: (0, 1) for shares, so that steps compare."""


def presentation_of(signal: str) -> Presentation:
    """Return how to draw a signal.

    Args:
        signal: a signal's name; it need not be registered.

    Returns:
        Its unit, reduction and limits.

    Example:
        >>> presentation_of("normalized_entropy").limits, presentation_of("max_logit").reduction
        ((0.0, 1.0), 'max')
        >>> presentation_of("unknown")
        Presentation(unit='unknown', reduction='mean', limits=(None, None))
    """
    if signal not in SIGNALS:
        return Presentation(signal)
    known = SIGNALS[signal]
    share = known.unit.startswith(("probability", "share"))
    return Presentation(known.unit, known.reduction, (0.0, 1.0) if share else (None, None))
