"""Where a quantity is heading: a robust line through its newest samples, and the steps left until it meets a level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Z_95 = 1.96
"""Quantile of the normal distribution that leaves 2.5 % on either side."""


@dataclass(frozen=True, eq=False)
class Trend:
    """A robust line through each of N columns; every array is ``[N]``, NaN where a column has under ``least`` samples."""

    slope: np.ndarray
    """Change per unit of x, the median over all pairs of samples."""
    low: np.ndarray
    """Lower end of the 95 % confidence interval of ``slope``."""
    high: np.ndarray
    """Upper end of it."""
    samples: np.ndarray
    """Finite samples used, int."""


def theil_sen(x: np.ndarray, y: np.ndarray, *, least: int = 8) -> Trend:
    """Median of the slopes between all pairs of samples: up to 29 % of them may be wild without moving it far.

    Args:
        x: ``[T]`` increasing abscissae, for example optimizer steps.
        y: ``[T, N]``; NaN and inf are samples that are not there.
        least: samples that a column needs.

    Returns:
        Slopes with Sen's interval, which supposes independent noise; samples of a training run are correlated, so read
        it as the least uncertainty there is.

    Source:
        Sen 1968, doi:10.1080/01621459.1968.10480934; the interval is Kendall's variance n(n-1)(2n+5)/18.

    >>> theil_sen(np.arange(9.0), np.array([0, 1, 2, 3, 99, 5, 6, 7, 8.0])[:, None]).slope
    array([1.])
    """
    y = np.where(np.isfinite(y), y, np.nan)
    samples = np.isfinite(y).sum(axis=0)
    later, earlier = np.tril_indices(len(x), -1)
    if len(x) < max(2, least):
        nothing = np.full(y.shape[1], np.nan)
        return Trend(nothing, nothing, nothing, samples)
    columns = np.ascontiguousarray(y.T)
    with np.errstate(invalid="ignore"):
        slopes = (columns[:, later] - columns[:, earlier]) / (x[later] - x[earlier])
    slopes.sort(axis=1)  # NaN go last, so that the first `pairs` of each row are its slopes
    pairs = samples * (samples - 1) // 2
    half_width = Z_95 * np.sqrt(samples * (samples - 1) * (2 * samples + 5) / 18)
    middle = (_at(slopes, (pairs - 1) // 2) + _at(slopes, pairs // 2)) / 2
    low = _at(slopes, np.floor((pairs - half_width) / 2).astype(int))
    high = _at(slopes, np.minimum(np.ceil((pairs + half_width) / 2).astype(int), pairs - 1))
    enough = samples >= max(2, least)
    middle, low, high = (np.where(enough, value, np.nan) for value in (middle, low, high))
    return Trend(middle, low, high, samples)


def steps_until(level: np.ndarray, slope: np.ndarray, target: float | np.ndarray) -> np.ndarray:
    """Units of x until ``level`` meets ``target`` at ``slope``; 0 where it is there already, inf where it never gets there.

    >>> steps_until(np.array([1.0, 9.0, 1.0]), np.array([2.0, 1.0, -1.0]), 5.0)
    array([ 2.,  0., inf])
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ahead = np.where(slope > 0, (target - level) / slope, np.inf)
    return np.where(np.isnan(level) | np.isnan(slope), np.nan, np.where(level >= target, 0.0, ahead))


def _at(rows: np.ndarray, index: np.ndarray) -> np.ndarray:
    """``rows[n, index[n]]`` with the index held inside the row."""
    picked: np.ndarray = rows[np.arange(len(rows)), np.clip(index, 0, rows.shape[1] - 1)]
    return picked
