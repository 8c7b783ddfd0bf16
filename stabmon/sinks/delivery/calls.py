"""Calls of a sink that wait: snapshots of their records, in a queue with a bound."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stabmon.records import Reading
from stabmon.sinks.base import Sink

MOST_BYTES = 64 * 2**20
"""Bytes of records that wait for one sink; see :meth:`WaitingCalls.append`."""
MOST_RECORDS = 10_000
"""Records that wait for one sink."""
_PLAIN_BYTES = 1024
"""Bytes that an issue, an incident or an audit record counts."""
_ARRAY_BYTES = 160
"""Bytes that an array takes beside its values."""
_KINDS = {
    "write_reading": "readings",
    "write_issues": "issues",
    "write_incidents": "incidents",
    "write_intervention": "interventions",
    "amend": "metadata",
}
_DROPPED_FIRST = ("readings", "incidents", "metadata", "interventions", "issues")
"""Kinds in the order in which a full queue drops them."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a sink's method, with records that nobody changes any more."""

    method: str
    arguments: tuple[Any, ...]
    steps: tuple[int, int] = (0, 0)
    """First and last optimizer step of its records."""
    count: int = 1
    """Number of its records."""
    size: int = _PLAIN_BYTES
    """Bytes of its records, about."""

    @property
    def kind(self) -> str:
        """Kind of its records, see :class:`~stabmon.sinks.delivery.gaps.Gap`; empty for none."""
        return _KINDS.get(self.method, "")

    def frozen(self) -> Call:
        """Return the call with copies of its records, which later changes do not reach."""
        if self.kind == "readings":
            reading, scalars = self.arguments
            return replace(self, arguments=(_copied(reading), dict(scalars)))
        if self.kind == "incidents":  # frozen records of plain values and issues
            return self
        return replace(self, arguments=copy.deepcopy(self.arguments))


def call_of(method: str, arguments: tuple[Any, ...], step: int) -> Call:
    """Return the call of a method, with what a gap would say of it.

    Args:
        method: name of a method of :class:`~stabmon.sinks.base.Sink`.
        arguments: its arguments.
        step: the newest step, for records without one of their own.
    """
    kind = _KINDS.get(method, "")
    if kind == "readings":
        own = getattr(arguments[0], "step", step)
        return Call(method, arguments, (own, own), 1, _size(arguments[0]))
    if kind in ("issues", "incidents"):
        steps = [getattr(each, "step", step) for each in arguments[0]] or [step]
        count = len(arguments[0])
        return Call(method, arguments, (min(steps), max(steps)), count, count * _PLAIN_BYTES)
    if kind == "interventions":
        own = arguments[0].get("step", step)
        return Call(method, arguments, (own, own))
    return Call(method, arguments, (step, step))


def is_heard(sink: Sink, method: str) -> bool:
    """Return whether a sink does anything with a call: the base's own methods do nothing."""
    names = ("write_issues", "write_issue") if method == "write_issues" else (method,)
    return any(getattr(type(sink), name, None) is not getattr(Sink, name) for name in names)


class WaitingCalls:
    """Calls in order, oldest first, no more than a bound.

    Args:
        on_drop: called with each call that is dropped.
        most_bytes: bytes of records.
        most_records: number of records.

    Example:
        >>> dropped = []
        >>> waiting = WaitingCalls(dropped.append, most_records=2)
        >>> for step in (1, 2):
        ...     waiting.append(call_of("write_reading", (Reading(step, None, {}), {}), step))
        >>> waiting.append(call_of("write_intervention", ({"step": 2},), 2))
        >>> [call.steps for call in dropped], [call.kind for call in waiting]
        ([(1, 1)], ['readings', 'interventions'])
    """

    def __init__(
        self,
        on_drop: Callable[[Call], None],
        most_bytes: int = MOST_BYTES,
        most_records: int = MOST_RECORDS,
    ) -> None:
        self._calls: deque[Call] = deque()
        self._on_drop = on_drop
        self._most_bytes, self._most_records = most_bytes, most_records
        self._bytes = self._records = 0

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Call]:
        return iter(self._calls)

    def append(self, call: Call) -> None:
        """Add the newest call; where there are too many, drop the oldest readings first.

        Then incidents, which issues say as well, then metadata; interventions and issues last.
        """
        last = self._calls[-1] if self._calls else None
        if last is not None and last.method == call.method == "amend":
            joined = {**last.arguments[0], **call.arguments[0]}
            self._calls[-1] = replace(call, arguments=(joined,))
            return
        self._calls.append(call)
        self._count(call, 1)
        while self._bytes > self._most_bytes or self._records > self._most_records:
            if len(self._calls) == 1 or not self._drop_oldest():
                return

    def popleft(self) -> Call:
        """Take the oldest call."""
        call = self._calls.popleft()
        self._count(call, -1)
        return call

    def appendleft(self, call: Call) -> None:
        """Put the oldest call back."""
        self._calls.appendleft(call)
        self._count(call, 1)

    def clear(self) -> list[Call]:
        """Take all calls."""
        taken = list(self._calls)
        self._calls.clear()
        self._bytes = self._records = 0
        return taken

    def _drop_oldest(self) -> bool:
        for kind in _DROPPED_FIRST:
            found = next((call for call in self._calls if call.kind == kind), None)
            if found is not None:
                self._calls.remove(found)
                self._count(found, -1)
                self._on_drop(found)
                return True
        return False

    def _count(self, call: Call, sign: int) -> None:
        self._bytes += sign * call.size
        self._records += sign * call.count


def _copied(reading: Any) -> Any:
    """Return a reading with arrays of its own."""
    if not isinstance(reading, Reading) or not isinstance(reading.layers, Mapping):
        return reading  # the sink says what is wrong with it
    layers = {
        layer: {name: np.array(heads) for name, heads in signals.items()}
        for layer, signals in reading.layers.items()
    }
    return replace(reading, layers=layers)


def _size(reading: Any) -> int:
    layers: Mapping[str, Mapping[str, Any]] = getattr(reading, "layers", None) or {}
    arrays: Sequence[Any] = [heads for signals in layers.values() for heads in signals.values()]
    return _PLAIN_BYTES + sum(_ARRAY_BYTES + np.asarray(each).nbytes for each in arrays)
