"""Confidence intervals from few runs."""

from __future__ import annotations

import math
from collections.abc import Sequence


def student_t(confidence: float, freedom: int) -> float:
    """Return the two-sided quantile of Student's t distribution.

    Args:
        confidence: probability of ``[-t, t]``, in (0, 1).
        freedom: degrees of freedom, at least 1.

    Returns:
        t > 0, by bisection of the distribution's closed form.

    References:
        Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.

    Example:
        >>> round(student_t(0.95, 2), 3), round(student_t(0.9, 7), 3)
        (4.303, 1.895)
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % confidence interval.

    Args:
        values: independent values under normal noise, at least one.

    Returns:
        Mean and half width; the half width is NaN for a single value.

    Example:
        >>> mean, half = mean_and_interval([1.0, 2.0, 3.0])
        >>> round(mean, 3), round(half, 3)
        (2.0, 2.484)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, student_t(0.95, count - 1) * deviation / math.sqrt(count)


def _within(angle: float, freedom: int) -> float:
    """Return the probability of ``|T| <= sqrt(freedom) tan(angle)``."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
