"""Middle and noise of a quantity, by measures that a few wild values do not move."""

from __future__ import annotations

import numpy as np

MAD_TO_SIGMA = 1.4826
"""Standard deviation over median absolute deviation of a normal distribution."""


def median(values: np.ndarray) -> np.ndarray:
    """Return the median of the finite values along the first axis.

    NumPy's ``nanmedian``, some 50 times faster; NaN where there is no finite value.

    Example:
        >>> median(np.array([[1.0, np.nan], [9.0, np.nan], [2.0, 5.0]]))
        array([2., 5.])
    """
    finite = np.isfinite(values)
    if finite.all() and len(values):  # as nearly always, and three times faster
        ordered = np.sort(values, axis=0)
        middle: np.ndarray = (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
        return middle
    ordered = np.sort(np.where(finite, values, np.nan), axis=0)  # NaN go last
    count = np.isfinite(ordered).sum(axis=0, keepdims=True)
    low = np.take_along_axis(ordered, np.maximum(count - 1, 0) // 2, axis=0)
    high = np.take_along_axis(ordered, np.minimum(count // 2, np.maximum(count - 1, 0)), axis=0)
    middle = ((low + high) / 2)[0]
    return middle


def median_over_steps(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return the median of the finite values along the first axis, each for the steps it stands for.

    A value counts for the steps since the one before it, so that readings that are close together
    do not outweigh others. The same as :func:`median` where steps are evenly spaced.

    Args:
        values: ``[T, N]``.
        steps: ``[T]`` increasing steps.

    Example:
        >>> values = np.array([[9.0], [9.0], [9.0], [1.0], [1.0]])
        >>> median_over_steps(values, np.array([1, 2, 3, 50, 100]))
        array([1.])
    """
    if len(steps) < 2:
        return median(values)
    passed = np.diff(steps, prepend=2 * steps[0] - steps[1])
    finite = np.isfinite(values)
    order = np.argsort(np.where(finite, values, np.inf), axis=0)
    ordered = np.take_along_axis(np.where(finite, values, np.nan), order, axis=0)
    weights = np.take_along_axis(np.where(finite, passed[:, None], 0), order, axis=0)
    reached = 2 * weights.cumsum(axis=0)
    total = weights.sum(axis=0)
    low, high = (reached >= total).argmax(axis=0), (reached > total).argmax(axis=0)
    columns = np.arange(values.shape[1])
    middle: np.ndarray = (ordered[low, columns] + ordered[high, columns]) / 2
    return middle


def robust_spread(values: np.ndarray) -> np.ndarray:
    """Return the standard deviation along the first axis, estimated robustly.

    By the median absolute deviation of the finite values.

    Example:
        >>> robust_spread(np.array([[1.0], [2.0], [3.0], [4.0], [500.0]]))
        array([1.4826])
    """
    return MAD_TO_SIGMA * median(np.abs(values - median(values)))


def largest(values: np.ndarray) -> np.ndarray:
    """Return the largest finite value along the first axis, NaN where there is none."""
    top: np.ndarray = np.fmax.reduce(np.where(np.isfinite(values), values, np.nan), axis=0)
    return top
