"""Numbers as bars of one character, readable without colour."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

BARS = "▁▂▃▄▅▆▇█"
DIGITS = "01234567"
"""Instead of :data:`BARS` where a terminal cannot show them."""
NOT_FINITE = "×"


def bars(
    values: Sequence[float] | np.ndarray,
    limits: tuple[float | None, float | None] = (None, None),
    glyphs: str = BARS,
) -> str:
    """Return one bar per value, from the lowest to the highest.

    Args:
        values: numbers; NaN and infinities become ``×``.
        limits: values of the lowest and the highest bar; None for those of the finite values.
        glyphs: the bars, lowest first.

    Example:
        >>> bars([0.0, 0.5, 1.0, float("nan")]), bars([1, 9], glyphs=DIGITS)
        ('▁▅█×', '07')
    """
    numbers = np.asarray(values, dtype=np.float64)
    finite = numbers[np.isfinite(numbers)]
    low = limits[0] if limits[0] is not None else finite.min(initial=np.inf)
    high = limits[1] if limits[1] is not None else finite.max(initial=-np.inf)
    span = high - low if high > low else 1.0
    with np.errstate(invalid="ignore"):
        places = np.clip((numbers - low) / span * len(glyphs), 0, len(glyphs) - 1)
    return "".join(
        glyphs[int(place)] if np.isfinite(number) else NOT_FINITE
        for number, place in zip(numbers, places, strict=True)
    )


def folded(values: np.ndarray, width: int, *, lowest: bool) -> np.ndarray:
    """Fold values to at most ``width``, each the extreme of neighbours; NaN wins.

    Args:
        values: ``[N]``.
        width: largest number of values to return.
        lowest: keep the lowest of neighbours; else the highest.

    Example:
        >>> folded(np.array([1.0, 5.0, 2.0, 3.0]), 2, lowest=True).tolist()
        [1.0, 2.0]
    """
    if len(values) <= width:
        return values
    edges = np.linspace(0, len(values), width + 1).round().astype(int)
    reduce = np.min if lowest else np.max
    return np.array([reduce(values[start:end]) for start, end in pairwise(edges)])
