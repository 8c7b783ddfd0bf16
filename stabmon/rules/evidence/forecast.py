"""Trend of a quantity: a robust line, and the steps left until it meets a level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stabmon.rules.tracking.history import History

Z_95 = 1.96
"""Quantile of the normal distribution that leaves 2.5 % on either side."""


@dataclass(frozen=True, eq=False)
class Trend:
    """Robust line through each of N columns; every array is ``[N]``.

    NaN where a column has fewer than ``least`` samples.
    """

    slope: np.ndarray
    """Change per unit of x, the median over all pairs of samples."""
    low: np.ndarray
    """Lower end of the 95 % confidence interval of ``slope``."""
    high: np.ndarray
    """Upper end of it."""
    samples: np.ndarray
    """Number of finite samples used, int."""


def theil_sen(x: np.ndarray, y: np.ndarray, *, least: int = 8) -> Trend:
    """Return the median of the slopes between all pairs of samples.

    Up to 29 % of the samples may be wild without moving it far.

    Args:
        x: ``[T]`` increasing abscissae, for example optimizer steps.
        y: ``[T, N]``; NaN and inf are samples that are not there.
        least: samples that a column needs.

    Returns:
        Slopes with Sen's interval, which supposes independent noise; samples of a training run are
        correlated, so read it as the least uncertainty there is.

    Example:
        >>> theil_sen(np.arange(9.0), np.array([0, 1, 2, 3, 99, 5, 6, 7, 8.0])[:, None]).slope
        array([1.])

    References:
        Sen 1968, doi:10.1080/01621459.1968.10480934; the interval is from Kendall's variance
        n(n-1)(2n+5)/18.
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
    low = _at(slopes, np.round((pairs - half_width) / 2).astype(int) - 1)
    high = _at(slopes, np.minimum(np.round((pairs + half_width) / 2).astype(int), pairs - 1))
    enough = samples >= max(2, least)
    middle, low, high = (np.where(enough, value, np.nan) for value in (middle, low, high))
    return Trend(middle, low, high, samples)


@dataclass(frozen=True, eq=False)
class Forecast:
    """Steps until each head's score meets a level at its present growth.

    Every array is ``[N]``; NaN for heads below the score from which a forecast is made, or with too
    few readings.
    """

    slope: np.ndarray
    """Change of the log score per optimizer step."""
    eta: np.ndarray
    """Optimizer steps until the level is met; inf where the score may not rise."""
    low: np.ndarray
    """Soonest that the slope's confidence interval allows, in optimizer steps."""
    high: np.ndarray
    """Latest that it allows, in optimizer steps."""

    def warns(self, horizon: float) -> np.ndarray:
        """Return ``[N]`` bool: the score surely meets the level within ``horizon`` steps."""
        warns: np.ndarray = (self.eta > 0) & (self.eta <= horizon) & (self.high <= 2 * horizon)
        return warns


def forecast_score(
    history: History,
    level: float,
    *,
    least: float,
    readings: int = 20,
    freshest: int = 8,
    signal: str = "max_logit",
) -> Forecast:
    """Forecast when each head's max_logit, or another signal that scales with it, meets a level.

    Scores that run away grow exponentially, so the line is drawn through their logarithms. The line
    through the ``freshest`` readings is taken where it surely rises, since a line through all
    ``readings`` shows a growth that has just begun only after half of them are part of it; else the
    line through all.

    Args:
        history: the readings so far.
        level: the value to be met.
        least: newest value of heads that are forecast; others are NaN.
        readings: number of newest readings that the line goes through.
        freshest: number of readings of the shorter line.
        signal: the signal that is forecast.
    """
    now = history.now(signal)
    large = np.flatnonzero(now >= least)
    out = Forecast(*np.full((4, len(now)), np.nan))
    if len(large) == 0:
        return out
    score = history.rows(signal, slice(-readings, None), large)
    with np.errstate(invalid="ignore", divide="ignore"):
        log = np.where(score > 0, np.log(score), np.nan)
    steps, target = history.steps[-readings:].astype(np.float64), float(np.log(level))
    line, fresh = theil_sen(steps, log), theil_sen(steps[-freshest:], log[-freshest:])
    rises = fresh.low > 0
    slope, low, high = (
        np.where(rises, getattr(fresh, name), getattr(line, name))
        for name in ("slope", "low", "high")
    )
    eta = np.where(
        low > 0, steps_until(log[-1], slope, target), np.where(np.isnan(low), np.nan, np.inf)
    )
    out.slope[large], out.eta[large] = slope, eta
    out.low[large] = steps_until(log[-1], high, target)
    out.high[large] = steps_until(log[-1], low, target)
    return out


def steps_until(level: np.ndarray, slope: np.ndarray, target: float | np.ndarray) -> np.ndarray:
    """Return the units of x until a value meets a target at its slope.

    Args:
        level: ``[N]`` values now.
        slope: ``[N]`` change per unit of x.
        target: value to be met.

    Returns:
        ``[N]``; 0 where it is met already, inf where it never is, NaN where unknown.

    Example:
        >>> steps_until(np.array([1.0, 9.0, 1.0]), np.array([2.0, 1.0, -1.0]), 5.0)
        array([ 2.,  0., inf])
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ahead = np.where(slope > 0, (target - level) / slope, np.inf)
    return np.where(
        np.isnan(level) | np.isnan(slope), np.nan, np.where(level >= target, 0.0, ahead)
    )


def _at(rows: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return ``rows[n, index[n]]`` with the index held inside the row."""
    picked: np.ndarray = rows[np.arange(len(rows)), np.clip(index, 0, rows.shape[1] - 1)]
    return picked
