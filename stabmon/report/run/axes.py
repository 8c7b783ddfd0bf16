"""Axes of charts: their range, round ticks, and short numbers beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stabmon.report.numbers import number

STEEP = 20.0
"""Ratio of largest to smallest value from which an axis is logarithmic."""


@dataclass(frozen=True)
class Scale:
    """An axis from ``low`` to ``high``."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Return the place of a value between ``low`` (0) and ``high`` (1), clipped."""
        if self.log:
            value = max(value, self.low)
            found = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            found = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, found))

    def ticks(self, most: int) -> list[float]:
        """Return at most ``most`` round values on the axis, at least one."""
        if self.log:
            low, high = (
                math.ceil(math.log10(self.low) - 1e-9),
                math.floor(math.log10(self.high) + 1e-9),
            )
            powers = [10.0**power for power in range(low, high + 1)]
            if len(powers) >= 2:
                return powers[:: -(-len(powers) // most)]
            return [self.low, self.high]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        step *= next(
            each for each in (1, 2, 5, 10) if (self.high - self.low) / (each * step) <= most
        )
        first = math.ceil(self.low / step - 1e-9)
        return [at * step for at in range(first, math.floor(self.high / step + 1e-9) + 1)]


def scale_of(
    arrays: Sequence[np.ndarray],
    limits: tuple[float | None, float | None] = (None, None),
    *,
    steep: bool = True,
) -> Scale:
    """Choose an axis that shows every finite value.

    Args:
        arrays: the values.
        limits: smallest and largest value to show; None for the values' own.
        steep: take a logarithm where values span more than a factor of ``STEEP``.

    Returns:
        The axis.

    Example:
        >>> scale_of([np.array([2.0, 3.0])]).log, scale_of([np.array([1.0, 900.0])]).log
        (False, True)
    """
    finite = np.concatenate([each[np.isfinite(each)].ravel() for each in arrays] or [np.zeros(0)])
    low = limits[0] if limits[0] is not None else float(finite.min(initial=math.inf))
    high = limits[1] if limits[1] is not None else float(finite.max(initial=-math.inf))
    if not (math.isfinite(low) and math.isfinite(high)):
        return Scale(0.0, 1.0)
    if steep and limits == (None, None) and low > 0 and high / low > STEEP:
        return Scale(low / 1.2, high * 1.2, log=True)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(
        low if limits[0] is not None else low - room, high if limits[1] is not None else high + room
    )


def tick_text(value: float) -> str:
    """Return a number short enough for the room beside a plot.

    Example:
        >>> tick_text(0.0002), tick_text(20_000.0), tick_text(0.25)
        ('2e-4', '2e4', '0.25')
    """
    if value and not 1e-3 <= abs(value) < 1e4:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return number(value)
