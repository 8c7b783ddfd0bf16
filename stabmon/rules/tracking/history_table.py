"""One signal of every head over the newest readings, grown in place."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from stabmon._storage.stored_value import Stored


class Table:
    """Newest rows of ``[T, N]`` float64, and each column's first finite values.

    A row is written once: appending to a full table costs one row, not a copy of all of them.

    Args:
        length: rows kept.
        baseline_length: number of a column's first finite values kept for its baseline.
        past: rows of NaN that stand before the first row: readings in which the signal was not
            measured.
        columns: N at first; a longer row widens the table.
    """

    def __init__(self, length: int, baseline_length: int, *, past: int, columns: int) -> None:
        self._length = length
        self._data = np.full((2 * length, columns), np.nan)
        self._end = min(past, length)
        self._first = np.full((baseline_length, columns), np.nan)
        self._baseline: np.ndarray | None = None

    @property
    def rows(self) -> np.ndarray:
        """``[T, N]``, oldest first."""
        return self._data[max(0, self._end - self._length) : self._end]

    def baseline(self) -> np.ndarray:
        """Return ``[N]``, the median of each column's first finite values.

        NaN where there are fewer than ``baseline_length``.
        """
        if self._baseline is None:
            self._baseline = np.median(self._first, axis=0)
        return self._baseline

    def append(self, row: np.ndarray) -> None:
        """Add the newest row; one longer than the table widens it with NaN."""
        missing = len(row) - self._data.shape[1]
        if missing > 0:
            self._data = _widen(self._data, missing)
            self._first = _widen(self._first, missing)
            self._baseline = None
        if self._end == len(self._data):
            self._data[: self._length] = self._data[-self._length :]
            self._end = self._length
        self._data[self._end] = row
        self._end += 1
        self._keep_first(row)

    def drop_newest(self) -> None:
        """Remove the newest row again; its part of the baseline stays."""
        self._end = max(0, self._end - 1)

    def keep_oldest(self, count: int) -> None:
        """Remove all rows but the oldest; the baseline stays."""
        rows = self.rows[:count].copy()
        self._data[:] = np.nan
        self._data[: len(rows)], self._end = rows, len(rows)

    def state_dict(self) -> dict[str, Any]:
        """Return rows and first values, bit for bit, as text."""
        return {"rows": _pack(self.rows), "first": _pack(self._first)}

    def load_state_dict(self, state: Mapping[str, Any] | Stored) -> None:
        """Continue from a state of :meth:`state_dict`.

        Raises:
            ValueError: if it is no table's state; the table is then as it was.
        """
        saved = Stored.of(state)
        rows, first = _unpack(saved["rows"]), _unpack(saved["first"])
        if first.shape[0] != self._first.shape[0]:
            raise ValueError(
                f"saved with a baseline of {first.shape[0]} readings, now {self._first.shape[0]}: "
                "use the same baseline_length"
            )
        if first.shape[1] != rows.shape[1]:
            raise ValueError(
                f"{saved.where} has {rows.shape[1]} columns and the first values of "
                f"{first.shape[1]}"
            )
        rows = rows[-self._length :]
        self._data = np.full((2 * self._length, rows.shape[1]), np.nan)
        self._data[: len(rows)] = rows
        self._end, self._first, self._baseline = len(rows), first, None

    def _keep_first(self, row: np.ndarray) -> None:
        empty = np.isnan(self._first)
        take = empty.any(axis=0) & np.isfinite(row)
        if take.any():
            columns = np.flatnonzero(take)
            self._first[empty.argmax(axis=0)[columns], columns] = row[columns]
            self._baseline = None


class Columns:
    """Named columns over the newest ``length`` rows; a row may lack or bring some."""

    def __init__(self, length: int) -> None:
        self._table = Table(length, 1, past=0, columns=0)
        self._at: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._table.rows)

    def append(self, values: Mapping[str, float]) -> None:
        """Add the newest row."""
        for name in values:
            self._at.setdefault(name, len(self._at))
        self._table.append(
            np.array([values.get(name, np.nan) for name in self._at], dtype=np.float64)
        )

    def drop_newest(self) -> None:
        """Remove the newest row again."""
        self._table.drop_newest()

    def keep_oldest(self, count: int) -> None:
        """Remove all rows but the oldest."""
        self._table.keep_oldest(count)

    def column(self, name: str) -> np.ndarray:
        """Return ``[T]``, oldest first; NaN where the row did not have it."""
        if name not in self._at:
            return np.full(len(self), np.nan)
        values: np.ndarray = self._table.rows[:, self._at[name]]
        return values

    def all(self) -> dict[str, np.ndarray]:
        """Return every column by name."""
        return {name: self.column(name) for name in self._at}


def _widen(data: np.ndarray, columns: int) -> np.ndarray:
    return np.concatenate([data, np.full((len(data), columns), np.nan)], axis=1)


def _pack(array: np.ndarray) -> dict[str, Any]:
    return {
        "shape": list(array.shape),
        "float64": base64.b64encode(np.ascontiguousarray(array, dtype="<f8").tobytes()).decode(),
    }


def _unpack(packed: Stored) -> np.ndarray:
    """Return the ``[T, N]`` that :func:`_pack` wrote."""
    shape = [side.integer() for side in packed["shape"].parts(2)]
    text = packed["float64"].text()
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError(f"{packed.where} holds no base64") from None
    if len(raw) != 8 * math.prod(shape):
        raise ValueError(
            f"{packed.where} holds {len(raw)} bytes, not the {8 * math.prod(shape)} of shape "
            f"{shape}: it is cut off"
        )
    return np.frombuffer(raw, dtype="<f8").reshape(shape).astype(np.float64)
