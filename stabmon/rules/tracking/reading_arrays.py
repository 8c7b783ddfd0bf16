"""Newest readings of a run as whole arrays over steps and heads."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stabmon._storage.stored_value import Stored
from stabmon.records import LayerInfo, Overshoot, Reading, head_count
from stabmon.rules.tracking.head_columns import HeadColumns
from stabmon.rules.tracking.history_table import WIDE, Columns, Table
from stabmon.rules.tracking.loss_record import LossRecord
from stabmon.rules.tracking.size_limits import most_readings, rows_to_store
from stabmon.rules.tracking.stored_reading import (
    reading_state,
    step_and_loss,
    stored_reading,
)

START_READINGS, START_STEPS = 4, 50
"""Readings, and optimizer steps, that are the start of a run, whichever lasts longer.

The readings of the start must show a falling loss, which takes some 20 steps under a warm-up; heads
that have learned were seen saturated from step 80 on.
"""
_LOSSES_PER_READING = 20
EVERY_READING = 1 << 30
"""Number of readings to look back on where no limit is known."""


@dataclass(frozen=True)
class LooksBack:
    """Part of the history that rules and interventions look at."""

    readings: Mapping[str, int]
    """Newest readings by signal; of any other signal the newest one."""
    baselines: frozenset[str] = frozenset()
    """Signals whose baseline is asked for."""

    def __or__(self, other: LooksBack) -> LooksBack:
        """Return the part that either looks at."""
        names = self.readings.keys() | other.readings.keys()
        readings = {
            name: max(self.readings.get(name, 1), other.readings.get(name, 1)) for name in names
        }
        return LooksBack(readings, self.baselines | other.baselines)


class ReadingArrays:
    """Newest readings as arrays ``[T, N]``; see :class:`~stabmon.rules.tracking.history.History`.

    Args:
        length: readings kept; older ones are dropped, but a head's ``baseline`` is kept.
        baseline_length: number of a head's first readings that make up its baseline.
        looks_back: what is kept of a model of very many heads; None for all.

    Raises:
        ValueError: if ``length`` is below 2 or ``baseline_length`` below 1.
    """

    def __init__(
        self, length: int = 256, baseline_length: int = 5, looks_back: LooksBack | None = None
    ) -> None:
        if length < 2 or baseline_length < 1:
            raise ValueError(
                f"history length {length} and baseline length {baseline_length}: use at least 2 "
                "and 1"
            )
        self.length = length
        """Most readings kept."""
        self.baseline_length, self.looks_back = baseline_length, looks_back
        self.readings: list[Reading] = []
        """Newest readings, oldest first."""
        self.info: dict[str, LayerInfo] = {}
        """Newest facts of each layer."""
        self._losses = LossRecord(_LOSSES_PER_READING * length)
        self._head_columns = HeadColumns()
        self._tables: dict[str, Table] = {}
        self._columns = {name: Columns(length) for name in ("gradients", "used_rates", "updates")}
        """Columns by the field of the reading that they hold."""
        self._overshoot: Overshoot | None = None
        self._pushed_out: list[Reading] = []
        """Readings that the newest one has pushed out."""
        self.count = 0
        """Readings of the run so far, also those that were dropped."""
        self.has_first = True
        """The oldest reading kept is the run's first."""
        self.treated: set[str] = set()
        """Layers whose attention an intervention has changed."""
        self.is_resumed = False
        """True if the run, or this history, began from a checkpoint."""

    @property
    def _spans(self) -> dict[str, slice]:
        """The columns of each layer."""
        return self._head_columns.spans

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
        """Return ``[T, N]`` float64 of one signal, NaN where it was not measured.

        Do not write into it.
        """
        if name not in self._tables:
            return np.full((len(self), len(self.heads)), np.nan)
        return self._tables[name].rows

    def now(self, name: str) -> np.ndarray:
        """Return ``[N]`` values of one signal in the newest reading.

        NaN where it was not measured.
        """
        if name not in self._tables or not self.readings:
            return np.full(len(self.heads), np.nan)
        return self._tables[name].newest

    def rows(
        self, name: str, which: slice, columns: slice | np.ndarray | None = None
    ) -> np.ndarray:
        """Return some rows of :meth:`signal`, for less than all of them cost.

        Args:
            name: name of the signal.
            which: numbers of the readings, oldest first.
            columns: heads along N; None for all.
        """
        if name in self._tables:
            return self._tables[name].take(which, columns)
        heads = np.arange(len(self.heads)) if columns is None else columns
        count = len(self.readings[which])
        return np.full((count, len(np.arange(len(self.heads))[heads])), np.nan)

    def baseline(self, name: str) -> np.ndarray:
        """Return ``[N]``, each head's median over its first finite values of a signal.

        Over ``baseline_length`` of them; NaN where it has fewer.
        """
        if name not in self._tables:
            return np.full(len(self.heads), np.nan)
        return self._tables[name].baseline()

    def seen(self, layer: str | None, head: int | None) -> bool:
        """Return True if the newest reading measured anything of this place.

        Always so of the run, and of what is no attention layer; of a head that its layer no longer
        has where the layer was measured.

        Args:
            layer: qualified name; None for the run.
            head: query head; None for the whole layer.
        """
        if layer not in self._spans:
            return True
        where = self._spans[layer]
        is_one = head is not None and head < where.stop - where.start
        at = slice(where.start + (head or 0), where.start + (head or 0) + 1) if is_one else where
        tables = self._tables.values()
        return any(bool(np.isfinite(table.newest[at]).any()) for table in tables)

    @property
    def heads(self) -> list[tuple[str, int]]:
        """(layer, head) of each column of N."""
        return self._head_columns.heads

    @property
    def layers(self) -> tuple[str, ...]:
        """Every attention layer so far, in the order of N."""
        return tuple(self._spans)

    def of_layer(self, layer: str) -> slice:
        """Return the range of the layer's heads along N."""
        return self._spans[layer]

    def layer_values(self, value_of: Callable[[LayerInfo], float]) -> np.ndarray:
        """Return ``[N]``, one value for each layer, computed from its facts."""
        values = [value_of(self.info[layer]) for layer in self._spans]
        sizes = [where.stop - where.start for where in self._spans.values()]
        return np.repeat(np.array(values, dtype=np.float64), sizes)

    def gradients(self, layer: str) -> np.ndarray:
        """Return ``[T]`` gradient norms of a layer's attention module; NaN where unknown.

        Of the whole model for the empty name.
        """
        return self._columns["gradients"].column(layer)

    @property
    def used_rates(self) -> dict[str, np.ndarray]:
        """``[T]`` rates that each parameter group was stepped with, by key; NaN where unknown.

        The scheduled rate, times the factor of interventions that are held. Do not write into it.
        """
        return self._columns["used_rates"].all()

    @property
    def group_updates(self) -> dict[str, np.ndarray]:
        """``[T]`` share of each group's parameters that a step changed; NaN where unknown."""
        return self._columns["updates"].all()

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every step whose loss is known, the newest 20 for each reading kept."""
        return self._losses.losses

    @property
    def rank_losses(self) -> list[tuple[int, float, int]]:
        """(step, largest loss of a rank, that rank) of the newest steps on several ranks."""
        return self._losses.rank_losses

    @property
    def recent_losses(self) -> np.ndarray:
        """``[K, 2]`` (step, loss) of the newest 2000 losses that are finite."""
        return self._losses.recent

    @property
    def overshoot(self) -> Overshoot | None:
        """Newest finding that steps are too long; None where there was none."""
        return self._overshoot

    def add(self, reading: Reading) -> None:
        """Append a reading; new layers extend N.

        One between samples stands only until the next comes, so that rows are evenly spaced.
        """
        self._drop_unsampled()
        self.count += 1
        for layer, values in reading.layers.items():
            known = reading.info.get(layer)
            if layer not in self._spans:
                self._head_columns.place(layer, known.heads if known else head_count(values))
            else:
                self._follow_heads(layer, _agreed_count(values))
            if known is not None:
                self.info[layer] = known
        for name in dict.fromkeys(name for values in reading.layers.values() for name in values):
            if name not in self._tables:
                self._tables[name] = self._new_table(past=len(self.readings))
        self._shorten()
        for name, table in self._tables.items():
            table.append(self._row(reading, name))
        self.readings.append(replace(reading, layers=self._views(reading)))
        self._keep_less()
        self._pushed_out = self.readings[: -self.length]
        del self.readings[: -self.length]
        self.has_first &= not self._pushed_out
        self._overshoot = reading.overshoot or self._overshoot
        self._losses.add(reading)
        self._add_columns(reading)

    def drop_copies(self) -> None:
        """Free the arrays that :meth:`signal` has put together; to be called once all have judged."""
        for table in self._tables.values():
            table.drop_copy()

    def is_at_start(self, layer: str) -> bool:
        """Return whether the newest reading still speaks of how a layer was initialised.

        It does in the first steps of a run, until an intervention changes the layer; not after a
        resume.

        Args:
            layer: qualified name.
        """
        own = {layer, layer.partition("#")[0]}
        if self.is_resumed or not self.readings or not own.isdisjoint(self.treated):
            return False
        return self.count <= START_READINGS or self.latest.step <= START_STEPS

    def rolled_back(self, step: int) -> None:
        """Drop what was read after ``step``, whose state the run is in again.

        Scores, gradients and losses of the course that was left are no past of what comes now. A
        finding that the rate is too high stays.

        Args:
            step: the optimizer step after which the state was taken.
        """
        self.readings = [reading for reading in self.readings if reading.step <= step]
        self._pushed_out = []
        rows: list[Table | Columns] = [*self._tables.values(), *self._columns.values()]
        for each in rows:
            each.keep_oldest(len(self.readings))
        self._losses.rolled_back(step)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as plain values.

        JSON and ``torch.save`` both take them; arrays are packed as text. Where all rows would take
        more than ``MOST_STORED_BYTES``, older readings are stored at growing intervals.
        """
        stored = rows_to_store(
            len(self.readings), len(self.heads), len(self._tables), self.baseline_length
        )
        return {
            "count": self.count,
            "has_first": self.has_first,
            "treated": sorted(self.treated),
            "heads": {layer: self._head_columns.count(layer) for layer in self._spans},
            "info": {layer: info.to_dict() for layer, info in self.info.items()},
            "losses": [list(pair) for pair in self.losses],
            "readings": [reading_state(self.readings[row]) for row in stored],
            "overshoot": None if self._overshoot is None else self._overshoot.to_dict(),
            "signals": {name: table.state_dict(stored) for name, table in self._tables.items()},
        }

    def load_state_dict(
        self, state: Mapping[str, Any] | Stored, known: Container[str] | None = None
    ) -> None:
        """Continue from a state of :meth:`state_dict`; what was here before is dropped.

        Args:
            state: a value of :meth:`state_dict`.
            known: names of the signals that exist today, others are left out; None to take all.

        Raises:
            ValueError: if it is no history's state; the history is then as it was.
        """
        saved = Stored.of(state)
        fresh = type(self)(self.length, self.baseline_length, self.looks_back)
        for layer, heads in saved["heads"].items():
            fresh._head_columns.place(layer, heads.integer())
        fresh.info = {layer: LayerInfo.from_dict(info) for layer, info in saved["info"].items()}
        losses = [step_and_loss(pair) for pair in saved["losses"].parts()]
        fresh._losses = self._losses.resumed(losses)
        count = len(saved["readings"].parts())
        for name, table in saved["signals"].items():
            if known is not None and name not in known:
                table.leave_out("there is no signal of that name any more")
                continue
            fresh._tables[name] = fresh._new_table(past=0)
            fresh._tables[name].load_state_dict(table)
            rows, columns = fresh._tables[name].rows.shape
            if (rows, columns) != (min(self.length, count), len(fresh.heads)):
                raise ValueError(
                    f"{table.where} has {rows} rows of {columns} values, for {count} "
                    f"readings of {len(fresh.heads)} heads"
                )
        dropped = saved["signals"].mapping().keys() - fresh._tables.keys()
        kept = saved["readings"].parts()[-self.length :]
        for row, each in enumerate(kept, start=-len(kept)):
            reading = stored_reading(each, fresh.info, fresh._values(row), dropped)
            fresh.readings.append(reading)
            fresh._add_columns(reading)
        fresh._keep_less()
        fresh.count = saved.get("count", len(fresh.readings)).integer()
        is_first = len(fresh.readings) < self.length  # as states without it meant
        fresh.has_first = saved.get("has_first", is_first).flag()
        fresh.treated = {each.text() for each in saved.get("treated", []).parts()}
        fresh.is_resumed = True
        fresh._overshoot = saved.get("overshoot", None).maybe(Overshoot.from_dict)
        vars(self).update(vars(fresh))

    def _drop_unsampled(self) -> None:
        """Drop the newest reading if it was made between samples for a finding alone."""
        newest = self.readings[-1] if self.readings else None
        if newest is None or newest.sampled or newest.non_finite is not None:
            return
        self.readings = [*self._pushed_out, *self.readings[:-1]]
        self._pushed_out = []
        rows: list[Table | Columns] = [*self._tables.values(), *self._columns.values()]
        for each in rows:
            each.drop_newest()

    def _shorten(self) -> None:
        """Keep fewer readings where those of so many heads take too much memory."""
        most = most_readings(len(self.heads), len(self._tables))
        if most < self.length:
            self.length = most
            rows: list[Table | Columns] = [*self._tables.values(), *self._columns.values()]
            for each in rows:
                each.length = most

    def _keep_less(self) -> None:
        """Drop what nothing looks back at, of a model of very many heads."""
        if self.looks_back is None or len(self.heads) <= WIDE:
            return
        for name, table in self._tables.items():
            depth = min(self.looks_back.readings.get(name, 1), self.length)
            if table.depth != depth:
                table.keep_less(depth, first=name in self.looks_back.baselines)
        self.readings[:-1] = [
            replace(each, layers={}) if each.layers else each for each in self.readings[:-1]
        ]

    def _views(self, reading: Reading) -> dict[str, dict[str, np.ndarray]]:
        """Return a reading's values as views of the rows that hold them."""
        newest = {name: table.newest for name, table in self._tables.items()}
        views: dict[str, dict[str, np.ndarray]] = {}
        for layer, values in reading.layers.items():
            where = self._spans[layer]
            size = where.stop - where.start
            views[layer] = {
                name: newest[name][where] if len(heads) == size else heads
                for name, heads in values.items()
            }
        return views

    def _follow_heads(self, layer: str, heads: int | None) -> None:
        """Forget a layer whose heads have changed, as by pruning; others keep their past."""
        if self._head_columns.note_count(layer, heads) and heads is not None:
            for table in self._tables.values():
                table.begin_anew(self._spans[layer], heads)
            self._head_columns.resize(layer, heads)

    def _new_table(self, past: int) -> Table:
        return Table(self.length, self.baseline_length, past=past, columns=len(self.heads))

    def _add_columns(self, reading: Reading) -> None:
        for name, columns in self._columns.items():
            columns.append(getattr(reading, name))

    def _row(self, reading: Reading, name: str) -> np.ndarray:
        """Return ``[N]`` values of one signal in a reading."""
        parts = [values.get(name) for values in reading.layers.values()]
        if list(reading.layers) == list(self._spans) and all(each is not None for each in parts):
            sizes = (where.stop - where.start for where in self._spans.values())
            known = [each for each in parts if each is not None]
            if all(len(each) == size for each, size in zip(known, sizes, strict=True)):
                return np.concatenate(known)
        out = np.full(len(self.heads), np.nan)
        for layer, values in reading.layers.items():
            where = self._spans[layer]
            if name in values and len(values[name]) == where.stop - where.start:
                out[where] = values[name]
        return out

    def _values(self, row: int) -> dict[str, dict[str, np.ndarray]]:
        """Return ``values[layer][signal]`` of one row."""
        return {
            layer: {name: table.rows[row, where] for name, table in self._tables.items()}
            for layer, where in self._spans.items()
        }


def _agreed_count(values: Mapping[str, np.ndarray]) -> int | None:
    """Return the number of heads of which all signals of a layer are; None where they differ."""
    counts = {len(heads) for heads in values.values()}
    return counts.pop() if len(counts) == 1 else None
