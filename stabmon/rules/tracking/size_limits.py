"""Bound the memory and the stored state of a history, however many heads a model has."""

from __future__ import annotations

import numpy as np

from stabmon.rules.tracking.history_table import WIDE

MOST_BYTES = 192 * 2**20
"""Most memory of the rows of all signals; a model of very many heads keeps fewer readings.

1000 layers of 128 heads and 11 signals keep 36.
"""
LEAST_READINGS = 36
"""Readings that are kept at any size: rules look back on no more heads' values than these."""
MOST_STORED_BYTES = 64 * 2**20
"""Most bytes of the rows in a state, before they become text.

A model of more than 2900 heads with 256 readings stores the older ones at growing intervals.
"""
LEAST_STORED = 8
"""Readings that a state holds at least."""


def most_readings(heads: int, signals: int) -> int:
    """Return the readings that memory allows.

    Args:
        heads: number of heads over all layers.
        signals: number of signals.

    Example:
        >>> most_readings(heads=12 * 12, signals=11) > 256, most_readings(1000 * 128, signals=11)
        (True, 36)
    """
    return max(LEAST_READINGS, MOST_BYTES // _row_bytes(heads, signals))


def rows_to_store(count: int, heads: int, signals: int, baseline_length: int) -> list[int]:
    """Return the numbers of the readings in a state, oldest first.

    Args:
        count: readings that are kept.
        heads: number of heads over all layers.
        signals: number of signals.
        baseline_length: rows of each signal that are stored beside the readings.

    Example:
        >>> rows_to_store(5, heads=4, signals=2, baseline_length=5)
        [0, 1, 2, 3, 4]
    """
    most = MOST_STORED_BYTES // _row_bytes(heads, signals) - baseline_length
    return thinned(count, max(LEAST_STORED, most))


def thinned(count: int, most: int) -> list[int]:
    """Choose among ``count`` rows, oldest first, the newest densely and older ones ever less.

    Args:
        count: number of rows.
        most: number of rows to choose.

    Returns:
        Row numbers in ascending order: all where there are no more than ``most``; else the newest
        half of them one by one, and the others at intervals that grow towards the oldest.

    Example:
        >>> thinned(20, 8)
        [0, 8, 12, 15, 16, 17, 18, 19]
    """
    if count <= most:
        return list(range(count))
    dense = most - most // 2
    ages = np.geomspace(dense, count - 1, most // 2).round().astype(int).tolist()
    for at in range(len(ages)):  # no two alike, at the dense end
        ages[at] = max(ages[at], dense + at)
    return sorted({count - 1 - age for age in (*range(dense), *ages)})


def _row_bytes(heads: int, signals: int) -> int:
    """Return the bytes of one reading's row of every signal."""
    itemsize = 4 if heads > WIDE else 8
    return max(1, heads * itemsize * signals)
