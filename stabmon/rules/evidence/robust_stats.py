"""Middle and noise of a quantity, by measures that a few wild values do not move."""

from __future__ import annotations

import functools

import numpy as np

FEW_COLUMNS, FEW_ROWS = 1024, 16
"""Columns from which on, and rows up to which, whole rows are compared to sort each column."""
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
        rows = _sorted_rows(values)
        middle: np.ndarray = (rows[(len(values) - 1) // 2] + rows[len(values) // 2]) / 2
        return middle
    if not len(values):
        return np.full(values.shape[1:], np.nan)
    ordered = np.array(_sorted_rows(np.where(finite, values, np.inf)))
    count = finite.sum(axis=0, keepdims=True)
    low = np.take_along_axis(ordered, np.maximum(count - 1, 0) // 2, axis=0)
    high = np.take_along_axis(ordered, np.minimum(count // 2, np.maximum(count - 1, 0)), axis=0)
    middle = np.where(count > 0, (low + high) / 2, np.nan)[0]
    return middle


def _sorted_rows(values: np.ndarray) -> list[np.ndarray]:
    """Return ``[T, N]`` without NaN in ascending order along T.

    Where N is large and T small, by comparing whole rows in pairs: ten times faster than a sort of
    each column.

    References:
        Batcher 1968, doi:10.1145/1468075.1468121, odd-even merge sort.
    """
    count = len(values)
    if values.ndim < 2 or values.shape[1] < FEW_COLUMNS or count > FEW_ROWS:
        return list(np.sort(values, axis=0))
    rows = list(values)
    for first, second in _comparisons(count):
        rows[first], rows[second] = (
            np.minimum(rows[first], rows[second]),
            np.maximum(rows[first], rows[second]),
        )
    return rows


@functools.cache
def _comparisons(count: int) -> tuple[tuple[int, int], ...]:
    """Return the pairs that sort ``count`` values when compared and exchanged in this order."""
    pairs, width = [], 1
    while width < count:
        step = width
        while step >= 1:
            for start in range(step % width, count - step, 2 * step):
                for at in range(start, min(start + step, count - step)):
                    if at // (2 * width) == (at + step) // (2 * width):
                        pairs.append((at, at + step))
            step //= 2
        width *= 2
    return tuple(pairs)


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
