"""Means over seeds, with the confidence that so few of them allow."""

from __future__ import annotations

import math
from collections.abc import Sequence

STUDENT_95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95% quantiles of Student's t by degrees of freedom; above 9 the normal one's 1.96 is
near enough times 1.1.
"""


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval under normal noise; NaN for a single
    value.

    >>> mean, half = mean_and_interval([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(half, 3)
    (2.0, 2.484)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = STUDENT_95[count - 1] if count <= len(STUDENT_95) else 1.1 * 1.96
    return mean, quantile * deviation / math.sqrt(count)
