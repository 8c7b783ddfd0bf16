"""Numbers as bars of one character, readable without colour."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

BARS = "▁▂▃▄▅▆▇"
"""Lowest to highest; the full block would run into the line above."""
NOT_FINITE = "×"


def bars(
    values: Sequence[float] | np.ndarray,
    limits: tuple[float | None, float | None] = (None, None),
) -> str:
    """Return one bar per value, from the lowest to the highest.

    Args:
        values: numbers; NaN and infinities become ``×``.
        limits: values of the lowest and the highest bar; None for those of the finite values.

    Example:
        >>> bars([0.0, 0.5, 1.0, float("nan")]), bars([1, 9])
        ('▁▄▇×', '▁▇')
    """
    numbers = np.asarray(values, dtype=np.float64)
    finite = numbers[np.isfinite(numbers)]
    low = limits[0] if limits[0] is not None else finite.min(initial=np.inf)
    high = limits[1] if limits[1] is not None else finite.max(initial=-np.inf)
    span = high - low if high > low else 1.0
    with np.errstate(invalid="ignore"):
        places = np.clip((numbers - low) / span * len(BARS), 0, len(BARS) - 1)
    return "".join(
        BARS[int(place)] if np.isfinite(number) else NOT_FINITE
        for number, place in zip(numbers, places, strict=True)
    )


def resampled(values: np.ndarray, width: int) -> np.ndarray:
    """Return ``width`` values: the largest of neighbours, or each repeated; NaN wins.

    Args:
        values: ``[N]``, at least one.
        width: number of values to return.

    Example:
        >>> resampled(np.array([1.0, 5.0, 2.0, 3.0]), 2), resampled(np.array([1.0, 2.0]), 4)
        (array([5., 3.]), array([1., 1., 2., 2.]))
    """
    if len(values) <= width:
        return values[np.arange(width) * len(values) // width]
    edges = np.arange(width + 1) * len(values) // width
    return np.array([values[start:end].max() for start, end in pairwise(edges)])
