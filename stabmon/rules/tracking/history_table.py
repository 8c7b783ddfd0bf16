"""One signal of every head over the newest readings, grown in place."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stabmon._storage.stored_value import Stored

WIDE = 4096
"""Columns above which rows are kept in float32: half the memory, and seven digits are enough."""


class Table:
    """Newest rows of ``[T, N]``, and each column's first finite values.

    Rows are kept one by one, so that a reading may hold views of them, and put together when they
    are asked for. They are float64, or float32 where there are more than ``WIDE`` columns.

    Args:
        length: rows kept.
        baseline_length: number of a column's first finite values kept for its baseline.
        past: rows of NaN that stand before the first row: readings in which the signal was not
            measured.
        columns: N at first; a longer row widens the table.
    """

    def __init__(self, length: int, baseline_length: int, *, past: int, columns: int) -> None:
        self.length = length
        self.depth: int | None = None
        """Newest rows of which values are kept, older ones are NaN; None for all."""
        self._columns = columns
        self._rows = [_unknown(columns, self.dtype)] * min(past, length)
        self._whole: np.ndarray | None = None
        self._baseline_length = baseline_length
        self._first = np.full((baseline_length, columns), np.nan, dtype=self.dtype)
        self._baseline: np.ndarray | None = None

    @property
    def dtype(self) -> type[np.floating[Any]]:
        """Type of the values that are kept."""
        return np.float32 if self._columns > WIDE else np.float64

    @property
    def rows(self) -> np.ndarray:
        """``[T, N]``, oldest first. Do not write into it."""
        if self._whole is None:
            kept = self._rows[-self.length :]
            if all(len(row) == self._columns for row in kept):
                self._whole = np.array(kept, dtype=self.dtype).reshape(len(kept), self._columns)
            else:
                self._whole = np.full((len(kept), self._columns), np.nan, dtype=self.dtype)
                for whole, row in zip(self._whole, kept, strict=True):
                    whole[: len(row)] = row
        return self._whole

    def take(self, rows: slice, columns: slice | np.ndarray | None = None) -> np.ndarray:
        """Return some of :attr:`rows`, without putting together the others. Do not write into it.

        Args:
            rows: those to return, oldest first.
            columns: those to return; None for all.
        """
        kept = self._rows[-self.length :][rows]
        if self._whole is None and all(len(row) == self._columns for row in kept):
            picked = kept if columns is None else [row[columns] for row in kept]
            if picked:
                return np.array(picked, dtype=self.dtype)
        whole = self.rows[rows]
        return whole if columns is None else whole[:, columns]

    @property
    def newest(self) -> np.ndarray:
        """``[N]``, the newest row, which is not copied."""
        row = self._rows[-1]
        return row if len(row) == self._columns else self.rows[-1]

    def baseline(self) -> np.ndarray:
        """Return ``[N]``, the median of each column's first finite values.

        NaN where there are fewer than ``baseline_length``.
        """
        if not len(self._first):
            return np.full(self._columns, np.nan)
        if self._baseline is None:
            self._baseline = np.median(self._first, axis=0)
        return self._baseline

    def append(self, row: np.ndarray) -> None:
        """Add the newest row; one longer than the table widens it with NaN."""
        missing = len(row) - self._columns
        if missing > 0:
            self._columns = len(row)
            self._first = _widen(self._first, missing).astype(self.dtype)
            self._baseline = None
        row = row.astype(self.dtype)
        self._rows.append(row)
        del self._rows[: -self.length - 1]  # one more, for where the newest is dropped again
        self._whole = None
        self._keep_first(row)
        self._forget_old()

    def drop_copy(self) -> None:
        """Free :attr:`rows`, which is put together anew where it is asked for."""
        self._whole = None

    def drop_newest(self) -> None:
        """Remove the newest row again; its part of the baseline stays."""
        del self._rows[-1:]
        self._whole = None

    def begin_anew(self, where: slice, count: int) -> None:
        """Replace some columns by others of which nothing is known yet.

        Args:
            where: the columns.
            count: number of columns in their place.
        """
        if self._columns < where.stop:
            return  # the table has not met these columns yet
        self._columns += count - (where.stop - where.start)
        self._rows = [_replaced(row, where, count).astype(self.dtype) for row in self._rows]
        self._first = _replaced(self._first, where, count).astype(self.dtype)
        self._whole = self._baseline = None
        self._forget_old()

    def keep_oldest(self, count: int) -> None:
        """Remove all rows but the oldest; the baseline stays."""
        self._rows = self._rows[-self.length :][:count]
        self._whole = None

    def state_dict(self, kept: Sequence[int]) -> dict[str, Any]:
        """Return rows and first values, bit for bit, as text.

        Args:
            kept: numbers of the rows to store.
        """
        first = self._first
        if not len(first):
            first = np.full((self._baseline_length, self._columns), np.nan, dtype=self.dtype)
        return {"rows": _pack(self.rows[list(kept)]), "first": _pack(first)}

    def keep_less(self, depth: int, *, first: bool) -> None:
        """Keep the values of fewer rows from here on; the others are NaN.

        Args:
            depth: newest rows of which values are kept.
            first: keep each column's first values, for its baseline.
        """
        if self.depth is None:  # rows may be views of one array, which each of them keeps
            self._rows = [row.copy() if any(row.strides) else row for row in self._rows]
        self.depth, self._whole = depth, None
        if not first:
            self._first, self._baseline = np.empty((0, self._columns)), None
        self._forget_old()

    def load_state_dict(self, state: Mapping[str, Any] | Stored) -> None:
        """Continue from a state of :meth:`state_dict`.

        Raises:
            ValueError: if it is no table's state; the table is then as it was.
        """
        saved = Stored.of(state)
        rows, first = _unpack(saved["rows"]), _unpack(saved["first"])
        if first.shape[0] != self._baseline_length:
            raise ValueError(
                f"saved with a baseline of {first.shape[0]} readings, now {self._baseline_length}: "
                "use the same baseline_length"
            )
        if first.shape[1] != rows.shape[1]:
            raise ValueError(
                f"{saved.where} has {rows.shape[1]} columns and the first values of "
                f"{first.shape[1]}"
            )
        self._columns = rows.shape[1]
        self._rows = list(rows[-self.length :].astype(self.dtype))
        self._first = first.astype(self.dtype)
        self._whole = self._baseline = None

    def _forget_old(self) -> None:
        """Drop the values of rows beyond ``depth``, but one for where the newest is dropped."""
        old = 0 if self.depth is None else len(self._rows) - self.depth - 1
        if old > 0:
            self._rows[:old] = [_unknown(self._columns, self.dtype)] * old

    def _keep_first(self, row: np.ndarray) -> None:
        if not len(self._first):
            return
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

    @property
    def length(self) -> int:
        """Rows kept."""
        return self._table.length

    @length.setter
    def length(self, rows: int) -> None:
        self._table.length = rows

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


def _unknown(columns: int, dtype: type[np.floating[Any]]) -> np.ndarray:
    """Return ``[N]`` NaN, which take no memory; for rows whose values are not kept."""
    return np.broadcast_to(np.array(np.nan, dtype=dtype), (columns,))


def _replaced(data: np.ndarray, where: slice, columns: int) -> np.ndarray:
    """Return an array with NaN in place of some columns; a shorter row ends before them."""
    if data.shape[-1] < where.stop:
        return data[..., : where.start]
    fresh = np.full((*data.shape[:-1], columns), np.nan)
    return np.concatenate([data[..., : where.start], fresh, data[..., where.stop :]], axis=-1)


def _widen(data: np.ndarray, columns: int) -> np.ndarray:
    return np.concatenate([data, np.full((len(data), columns), np.nan)], axis=1)


def _pack(array: np.ndarray) -> dict[str, Any]:
    ordered = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {
        "shape": list(array.shape),
        array.dtype.name: base64.b64encode(ordered.tobytes()).decode(),
    }


def _unpack(packed: Stored) -> np.ndarray:
    """Return the ``[T, N]`` that :func:`_pack` wrote."""
    shape = [side.integer() for side in packed["shape"].parts(2)]
    name = "float32" if "float32" in packed else "float64"
    size = np.dtype(name).itemsize
    text = packed[name].text()
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError(f"{packed.where} holds no base64") from None
    if len(raw) != size * math.prod(shape):
        raise ValueError(
            f"{packed.where} holds {len(raw)} bytes, not the {size * math.prod(shape)} of shape "
            f"{shape}: it is cut off"
        )
    return np.frombuffer(raw, dtype=f"<f{size}").reshape(shape).astype(name)
