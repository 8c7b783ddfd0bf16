"""The readings so far, as whole arrays over steps and heads, for rules to look at."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np

from stabmon._storage.stored_value import Stored
from stabmon.records import LayerInfo, NonFinite, Overshoot, Reading, StabilityIssue
from stabmon.rules.tracking.history_table import Columns, Table


class History:
    """Bounded record of readings.

    T readings (oldest first), N heads over all layers in a fixed order (``heads[n]`` is ``(layer,
    head)``). A layer that comes late, misses a reading, or has another number of heads in it than
    at first, is NaN where it is missing.

    Args:
        length: readings kept; older ones are dropped, but a head's ``baseline`` is kept.
        baseline_length: how many of a head's first readings make up its baseline.
    """

    def __init__(self, length: int = 256, baseline_length: int = 5) -> None:
        if length < 2 or baseline_length < 1:
            raise ValueError(
                f"history length {length} and baseline length {baseline_length}: use at least 2 "
                "and 1"
            )
        self.length = length
        self.baseline_length = baseline_length
        self.readings: list[Reading] = []
        self.heads: list[tuple[str, int]] = []
        self.info: dict[str, LayerInfo] = {}
        self.losses: list[tuple[int, float]] = []
        """(step, loss) of every step whose loss is known, the newest ``20 * length`` of them."""
        self._index: dict[str, slice] = {}
        self._tables: dict[str, Table] = {}
        self._clear_columns()
        self._recent_losses: np.ndarray | None = None
        self._overshoot: Overshoot | None = None
        self._pushed_out: list[Reading] = []
        """What the newest reading has pushed out."""
        self._open: dict[str, dict[tuple[str | None, int | None], float]] = {}

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
        if name not in self._tables:
            return np.full((len(self), len(self.heads)), np.nan)
        return self._tables[name].rows

    def now(self, name: str) -> np.ndarray:
        """``[N]`` values of one signal in the newest reading, NaN where it was not measured."""
        newest: np.ndarray = self.signal(name)[-1]
        return newest

    def baseline(self, name: str) -> np.ndarray:
        """``[N]`` each head's own past: the median of its first ``baseline_length`` finite values;
        NaN where it has fewer.
        """
        if name not in self._tables:
            return np.full(len(self.heads), np.nan)
        return self._tables[name].baseline()

    def seen(self, layer: str | None, head: int | None) -> bool:
        """Whether the newest reading says anything of this place; always so of the run and of what
        is no attention layer.
        """
        if layer not in self._index:
            return True
        where = self._index[layer]
        at = where if head is None else slice(where.start + head, where.start + head + 1)
        return any(bool(np.isfinite(table.rows[-1, at]).any()) for table in self._tables.values())

    @property
    def layers(self) -> tuple[str, ...]:
        """Every attention layer seen so far, in the order of N."""
        return tuple(self._index)

    def of_layer(self, layer: str) -> slice:
        """Where the heads of ``layer`` lie along N."""
        return self._index[layer]

    def layer_values(self, value_of: Mapping[str, Any] | Any) -> np.ndarray:
        """``[N]`` from one value a layer: a mapping by layer, or a function of (layer,
        LayerInfo).
        """
        out = np.full(len(self.heads), np.nan)
        for layer, where in self._index.items():
            value = (
                value_of(layer, self.info[layer])
                if callable(value_of)
                else value_of.get(layer, np.nan)
            )
            out[where] = value
        return out

    def gradients(self, layer: str) -> np.ndarray:
        """``[T]`` gradient norm of a layer's attention module (``""``: of the whole model), NaN
        where unknown.
        """
        return self._norms.column(layer)

    @property
    def group_rates(self) -> dict[str, np.ndarray]:
        """``[T]`` scheduled learning rate of each parameter group of each optimizer, by key; NaN
        where unknown. Do not write into it.
        """
        return self._rates.all()

    @property
    def used_rates(self) -> dict[str, np.ndarray]:
        """``[T]`` the rate that each group was stepped with: what is scheduled, times what
        interventions that are held made of it.
        """
        return self._used.all()

    @property
    def group_updates(self) -> dict[str, np.ndarray]:
        """``[T]`` share of itself by which a step moved each group's parameters, by key; NaN where
        unknown.
        """
        return self._updates.all()

    @property
    def recent_losses(self) -> np.ndarray:
        """``[K, 2]`` (step, loss) of the newest 2000 losses that are finite."""
        if self._recent_losses is None:
            newest = np.array(self.losses[-2000:], dtype=np.float64).reshape(-1, 2)
            self._recent_losses = newest[np.isfinite(newest[:, 1])]
        return self._recent_losses

    @property
    def non_finite(self) -> NonFinite | None:
        """Where a NaN or inf first came up, if one did since the last reading."""
        return self.latest.non_finite

    @property
    def overshoot(self) -> Overshoot | None:
        """The newest finding that steps are too long; None where there was none."""
        return self._overshoot

    def is_open(self, issue_type: str) -> np.ndarray:
        """``[N]`` bool: the head has an open issue of this type."""
        open_ = self._open.get(issue_type, {})
        return np.array([head in open_ for head in self.heads], dtype=bool)

    def is_open_at(
        self, issue_type: str, layer: str | None = None, head: int | None = None
    ) -> bool:
        """Whether an issue of this type is open for exactly this layer and head (None, None: for
        the run).
        """
        return (layer, head) in self._open.get(issue_type, {})

    def open_level_at(
        self, issue_type: str, layer: str | None = None, head: int | None = None
    ) -> float:
        """The threshold of the open issue of this type for exactly this layer and head; NaN where
        none is open, or it is older than the history."""
        return self._open.get(issue_type, {}).get((layer, head), np.nan)

    def open_level(self, issue_type: str) -> np.ndarray:
        """``[N]`` threshold of the head's open issue of this type, NaN where none is open: what
        hysteresis is measured from.

        NaN too once the issue is older than the history: what has lasted that long is the head's
        new normal.
        """
        open_ = self._open.get(issue_type, {})
        if not open_:
            return np.full(len(self.heads), np.nan)
        return np.array([open_.get(head, np.nan) for head in self.heads], dtype=np.float64)

    def add(self, reading: Reading) -> None:
        """Append a reading; new layers extend N. One between samples stands only until the next
        comes, so that rows are evenly spaced.
        """
        self._drop_notice()
        for layer, values in reading.layers.items():
            if layer not in self._index:
                heads = (
                    reading.info[layer].heads
                    if layer in reading.info
                    else max((len(v) for v in values.values()), default=0)
                )
                self._place(layer, heads)
            if layer in reading.info:
                self.info[layer] = reading.info[layer]
            for name in values:
                if name not in self._tables:
                    self._tables[name] = Table(
                        self.length,
                        self.baseline_length,
                        past=len(self.readings),
                        columns=len(self.heads),
                    )
        self.readings.append(reading)
        self._pushed_out = self.readings[: -self.length]
        del self.readings[: -self.length]
        self._overshoot = reading.overshoot or self._overshoot
        for name, table in self._tables.items():
            table.append(self._row(reading, name))
        self.losses += reading.losses or (
            ((reading.step, reading.loss),) if reading.loss is not None else ()
        )
        del self.losses[: -20 * self.length]
        self._recent_losses = None
        self._add_columns(reading)

    def _drop_notice(self) -> None:
        if (
            not self.readings
            or self.readings[-1].sampled
            or self.readings[-1].non_finite is not None
        ):
            return
        self.readings = [*self._pushed_out, *self.readings[:-1]]
        self._pushed_out = []
        for table in self._tables.values():
            table.drop_newest()
        for columns in (self._norms, self._rates, self._used, self._updates):
            columns.drop_newest()

    def set_open(self, issues: Iterable[tuple[StabilityIssue, int]]) -> None:
        """Tell which issues are open, each with the step at which it opened: what ``is_open`` and
        ``open_level`` answer from.
        """
        self._open = {}
        oldest = self.readings[0].step if self.readings else 0
        for issue, since in issues:
            level = issue.threshold if since >= oldest else np.nan
            self._open.setdefault(issue.issue_type, {})[issue.layer, issue.head] = level

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as plain values that JSON and ``torch.save`` both take;
        arrays packed as text.
        """
        return {
            "heads": {layer: where.stop - where.start for layer, where in self._index.items()},
            "info": {layer: info.to_dict() for layer, info in self.info.items()},
            "losses": [list(pair) for pair in self.losses],
            "readings": [_plain(reading) for reading in self.readings],
            "overshoot": None if self._overshoot is None else self._overshoot.to_dict(),
            "signals": {name: table.state_dict() for name, table in self._tables.items()},
        }

    def load_state_dict(
        self, state: Mapping[str, Any] | Stored, known: Container[str] | None = None
    ) -> None:
        """Go on where :meth:`state_dict` was taken; what was here before is dropped.

        Args:
            state: what it gave.
            known: signals that there are today, others are left out; None to take all.

        Raises:
            ValueError: if it is no history's state; the history is then as it was.
        """
        saved, fresh = Stored.of(state), History(self.length, self.baseline_length)
        for layer, heads in saved["heads"].items():
            fresh._place(layer, heads.integer())
        fresh.info = {layer: LayerInfo.from_dict(info) for layer, info in saved["info"].items()}
        fresh.losses = [_step_and_loss(pair) for pair in saved["losses"].parts()][
            -20 * self.length :
        ]
        readings = saved["readings"].parts()
        for name, table in saved["signals"].items():
            if known is not None and name not in known:
                table.leave_out("no signal of that name is known any more")
                continue
            fresh._tables[name] = Table(
                self.length, self.baseline_length, past=0, columns=len(fresh.heads)
            )
            fresh._tables[name].load_state_dict(table)
            if fresh._tables[name].rows.shape != (
                min(self.length, len(readings)),
                len(fresh.heads),
            ):
                rows, columns = fresh._tables[name].rows.shape
                raise ValueError(
                    f"{table.where} has {rows} rows of {columns} values, for {len(readings)} "
                    f"readings of {len(fresh.heads)} heads"
                )
        readings = readings[-self.length :]
        dropped = saved["signals"].mapping().keys() - fresh._tables.keys()
        fresh.readings = [
            fresh._reading(each, row - len(readings), dropped) for row, each in enumerate(readings)
        ]
        for reading in fresh.readings:
            fresh._add_columns(reading)
        fresh._overshoot = saved.get("overshoot", None).maybe(Overshoot.from_dict)
        vars(self).update(vars(fresh))

    def _place(self, layer: str, heads: int) -> None:
        """Give a new layer its columns."""
        start = len(self.heads)
        self._index[layer] = slice(start, start + heads)
        self.heads += [(layer, head) for head in range(heads)]

    def _clear_columns(self) -> None:
        self._norms, self._rates, self._used, self._updates = (
            Columns(self.length) for _ in range(4)
        )

    def _add_columns(self, reading: Reading) -> None:
        self._norms.append(reading.gradients)
        self._rates.append(reading.learning_rates)
        self._used.append(reading.used_rates)
        self._updates.append(reading.updates)

    def _row(self, reading: Reading, name: str) -> np.ndarray:
        out = np.full(len(self.heads), np.nan)
        for layer, values in reading.layers.items():
            where = self._index[layer]
            if name in values and len(values[name]) == where.stop - where.start:
                out[where] = values[name]
        return out

    def _reading(self, saved: Stored, row: int, dropped: Container[str]) -> Reading:
        """The reading of one row (counted from the end, -1 is the newest) that :func:`_plain`
        wrote, without signals that are dropped.
        """
        layers: dict[str, dict[str, np.ndarray]] = {}
        for layer, names in saved["layers"].items():
            if layer not in self._index:
                raise ValueError(f"{names.where} is no layer of the history")
            kept = [name for name in map(Stored.text, names.parts()) if name not in dropped]
            if odd := [name for name in kept if name not in self._tables]:
                raise ValueError(
                    f"{names.where} names the signal {odd[0]!r}, of which there are no values"
                )
            layers[layer] = {
                name: self._tables[name].rows[row, self._index[layer]].copy() for name in kept
            }
        info = [layer.text() for layer in saved["info"].parts()]
        if odd := [layer for layer in info if layer not in self.info]:
            raise ValueError(f"{saved.where}.info names {odd[0]!r}, of which nothing is known")
        for name in _ALWAYS_STORED:
            saved[name]
        return Reading.from_dict(
            saved, layers=layers, info={layer: self.info[layer] for layer in info}
        )


def _step_and_loss(pair: Stored) -> tuple[int, float]:
    step, loss = pair.parts(2)
    return step.integer(), loss.number()


_ALWAYS_STORED = (
    *("learning_rate", "gradients", "query_key", "losses"),
    *("micro_batches", "non_finite", "overhead_fraction"),
)
"""Fields with defaults that every state has; without one of them it is damaged."""


def _plain(reading: Reading) -> dict[str, Any]:
    """Return a reading without its arrays and layer descriptions, which are stored apart."""
    names = {layer: list(values) for layer, values in reading.layers.items()}
    return reading.to_dict() | {"layers": names, "info": list(reading.info)}
