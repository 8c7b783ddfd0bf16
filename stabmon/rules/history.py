"""The readings so far, as whole arrays over steps and heads, for rules to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stabmon.records import LayerInfo, NonFinite, Reading


class History:
    """Bounded record of readings.

    T readings (oldest first), N heads over all layers in a fixed order (``heads[n]`` is ``(layer, head)``). A layer that
    comes late, or misses a reading, is NaN where it is missing.

    Args:
        length: readings kept; older ones are dropped, but a head's ``baseline`` is kept.
        baseline_length: how many of a head's first readings make up its baseline.
    """

    def __init__(self, length: int = 256, baseline_length: int = 5) -> None:
        if length < 2 or baseline_length < 1:
            raise ValueError(f"history length {length} and baseline length {baseline_length}: use at least 2 and 1")
        self.length = length
        self.baseline_length = baseline_length
        self.readings: list[Reading] = []
        self.heads: list[tuple[str, int]] = []
        self.info: dict[str, LayerInfo] = {}
        self.losses: list[tuple[int, float]] = []
        """(step, loss) of every step whose loss is known, the newest ``20 * length`` of them."""
        self._index: dict[str, slice] = {}
        self._first: dict[str, list[np.ndarray]] = {}
        self._open: dict[str, set[tuple[str | None, int | None]]] = {}
        self._cache: dict[tuple[str, str], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.readings)

    @property
    def latest(self) -> Reading:
        """The newest reading."""
        return self.readings[-1]

    @property
    def steps(self) -> np.ndarray:
        """``[T]`` optimizer steps, int."""
        return np.array([reading.step for reading in self.readings], dtype=np.int64)

    def signal(self, name: str) -> np.ndarray:
        """``[T, N]`` float64 of one signal, NaN where it was not measured. Do not write into it."""
        return self._cached("signal", name, lambda: np.stack([self._row(r, name) for r in self.readings]))

    def now(self, name: str) -> np.ndarray:
        """``[N]`` values of one signal in the newest reading, NaN where it was not measured."""
        return self._row(self.latest, name)

    def baseline(self, name: str) -> np.ndarray:
        """``[N]`` each head's own past: the median of its first ``baseline_length`` finite values; NaN where it has fewer."""
        return self._cached("baseline", name, lambda: self._baseline(name))

    def of_layer(self, layer: str) -> slice:
        """Where the heads of ``layer`` lie along N."""
        return self._index[layer]

    def layer_values(self, value_of: Mapping[str, Any] | Any) -> np.ndarray:
        """``[N]`` from one value a layer: a mapping by layer, or a function of (layer, LayerInfo)."""
        out = np.full(len(self.heads), np.nan)
        for layer, where in self._index.items():
            value = value_of(layer, self.info[layer]) if callable(value_of) else value_of.get(layer, np.nan)
            out[where] = value
        return out

    def gradients(self, layer: str) -> np.ndarray:
        """``[T]`` gradient norm of a layer's attention module (``""``: of the whole model), NaN where unknown."""
        return np.array([reading.gradients.get(layer, np.nan) for reading in self.readings])

    @property
    def non_finite(self) -> NonFinite | None:
        """Where a NaN or inf first came up, if one did since the last reading."""
        return self.latest.non_finite

    def is_open(self, issue_type: str) -> np.ndarray:
        """``[N]`` bool: the head has an open issue of this type."""
        open_ = self._open.get(issue_type, set())
        return np.array([head in open_ for head in self.heads], dtype=bool)

    def is_open_at(self, issue_type: str, layer: str | None = None, head: int | None = None) -> bool:
        """Whether an issue of this type is open for exactly this layer and head (None, None: for the run)."""
        return (layer, head) in self._open.get(issue_type, set())

    def add(self, reading: Reading) -> None:
        """Append a reading; new layers extend N."""
        for layer, values in reading.layers.items():
            if layer not in self._index:
                heads = reading.info[layer].heads if layer in reading.info else max((len(v) for v in values.values()), default=0)
                start = len(self.heads)
                self._index[layer] = slice(start, start + heads)
                self.heads += [(layer, head) for head in range(heads)]
            if layer in reading.info:
                self.info[layer] = reading.info[layer]
            for name, value in values.items():
                first = self._first.setdefault(f"{layer}\0{name}", [])
                if len(first) < self.baseline_length and np.isfinite(value).any():
                    first.append(np.asarray(value, dtype=np.float64))
        self.readings.append(reading)
        del self.readings[: -self.length]
        self.losses += reading.losses or (((reading.step, reading.loss),) if reading.loss is not None else ())
        del self.losses[: -20 * self.length]
        self._cache.clear()

    def set_open(self, keys: set[tuple[str, str | None, int | None]]) -> None:
        """Tell which issues, as (issue_type, layer, head), are open: what ``is_open`` answers from."""
        self._open = {}
        for issue_type, layer, head in keys:
            self._open.setdefault(issue_type, set()).add((layer, head))

    def _cached(self, kind: str, name: str, make: Any) -> np.ndarray:
        if (kind, name) not in self._cache:
            self._cache[kind, name] = make()
        return self._cache[kind, name]

    def _row(self, reading: Reading, name: str) -> np.ndarray:
        out = np.full(len(self.heads), np.nan)
        for layer, values in reading.layers.items():
            if name in values:
                out[self._index[layer]] = values[name]
        return out

    def _baseline(self, name: str) -> np.ndarray:
        out = np.full(len(self.heads), np.nan)
        for layer, where in self._index.items():
            first = self._first.get(f"{layer}\0{name}", [])
            if len(first) == self.baseline_length:
                values = np.stack(first)
                full = np.isfinite(values).all(axis=0)
                out[where] = np.where(full, np.median(np.where(full, values, 0.0), axis=0), np.nan)
        return out
