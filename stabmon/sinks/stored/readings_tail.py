"""The newest reading of a run and its loss line, from the new bytes of its readings."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stabmon._storage import strict_json
from stabmon.records import Reading
from stabmon.sinks.stored.file_tail import FileTail
from stabmon.sinks.stored.line_file import LineFile
from stabmon.sinks.stored.lines import (
    HEAD_BYTES,
    LineFacts,
    facts_of,
    head_of,
    layer_signals,
)

WHOLE_BYTES = 4 << 20
"""Most bytes of which every line is looked at; of more, lines evenly apart."""
SAMPLES = 128
"""Lines looked at where there are more bytes."""
MOST_POINTS = 4096
"""Points of the loss line that are kept; of more, every second one goes."""


class Point(NamedTuple):
    """Step and loss of a stored reading, and where its line begins."""

    step: int
    loss: float | None
    position: int


class Start(NamedTuple):
    """One opening of the folder by a run, with its first reading."""

    run: int
    start: int
    first_step: int
    position: int


class ReadingsTail:
    """Newest reading and loss line of the newest run in ``readings.jsonl``.

    The first look costs the same for any size: the last line, a bisection for each start of the
    run, and :data:`SAMPLES` lines for the loss. Later looks read what was appended. Of each line but
    the newest only step and loss are read.

    Args:
        path: the file; it need not exist yet.

    Attributes:
        newest: the newest reading; None before the first.
        points: step and loss of readings of the newest run, in order.
        starts: each start of each run, with its first step.
        written: time of the last change of the file, in seconds since 1970 by its disk's clock.
    """

    def __init__(self, path: Path) -> None:
        self._tail = FileTail(path)
        self._forget()
        self.written: float | None = None

    def _forget(self) -> None:
        self.newest: Reading | None = None
        self.points: list[Point] = []
        self.starts: list[Start] = []

    def look(self) -> bool:
        """Read what is new.

        Returns:
            True if there is a new reading.

        Raises:
            OSError: if the file is there and cannot be read.
        """
        with self._tail.opened() as file:
            if file is None:
                return False
            self.written = file.stat.st_mtime
            again = self._tail.is_new(file)
            if not again and file.end == self._tail.reached:
                return False
            if again or file.end - self._tail.reached > WHOLE_BYTES:
                self._first_look(file)
            else:
                self._follow(file)
            return True

    @property
    def run(self) -> int:
        """Number of the newest run with a reading; 0 before the first."""
        return self.starts[-1].run if self.starts else 0

    def layer_history(
        self, layer: str, most: int = 60
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield step and signals of one layer, at points of the loss line evenly apart.

        A damaged line is left out.

        Args:
            layer: the layer's name.
            most: largest number of points.

        Raises:
            OSError: if the file cannot be read.
        """
        chosen = self.points[:: -(-len(self.points) // most) or 1]
        if self.points and chosen[-1] != self.points[-1]:
            chosen.append(self.points[-1])
        with LineFile(self._tail.path) as file:
            for point in chosen:
                found = file.after(point.position)
                if found is not None and found[0] == point.position:
                    try:
                        signals = layer_signals(found[1], layer)
                    except Exception:  # a damaged line may fail in any way
                        continue
                    yield point.step, signals

    def _follow(self, file: LineFile) -> None:
        """Take the lines appended since the last look."""
        newest = b""
        for position, line in self._tail.new_lines(file):
            facts = _facts(line)
            if facts is not None:
                self._take(facts, position)
                newest = line
        self._read_newest(newest)

    def _take(self, facts: LineFacts, position: int) -> None:
        """Add a reading to the loss line; a later start wins from its first reading on."""
        last = self.starts[-1] if self.starts else Start(0, 0, 0, 0)
        if facts.run != last.run:
            self.points = []
        if (facts.run, facts.start) != (last.run, last.start):
            self.starts.append(Start(facts.run, facts.start, facts.step, position))
        self._add(Point(facts.step, facts.loss, position))

    def _add(self, point: Point) -> None:
        del self.points[bisect_left(self.points, point.step, key=lambda each: each.step) :]
        self.points.append(point)
        if len(self.points) > MOST_POINTS:
            del self.points[1:-1:2]

    def _read_newest(self, line: bytes) -> None:
        """Parse the newest line; what cannot be parsed leaves the reading before it.

        Layers that a line leaves out, since they take turns, stay as they were last.
        """
        try:
            values = strict_json.loads(line)
            newest, before = Reading.from_dict(values, info={}), self.newest
        except Exception:  # a damaged line may fail in any way
            return
        if values.get("layers_left_out") and before is not None and before.step <= newest.step:
            newest = replace(newest, layers={**before.layers, **newest.layers})
        self.newest = newest

    def _first_look(self, file: LineFile) -> None:
        """Read the newest line, and find the starts and a loss line without reading all."""
        self._forget()
        self._tail.move_to(file, file.end)
        found = _last_before(file, file.end)
        if found is None:
            return
        position, line, facts = found
        self.starts = _starts(file, facts)
        own = [start for start in self.starts if start.run == self.run]
        ends = [*(start.position for start in own[1:]), position]
        for start, end in zip(own, ends, strict=True):
            for point in _points(file, start.position, end):
                self._add(point)
        self._add(Point(facts.step, facts.loss, position))
        self._read_newest(line)


def count_readings(path: Path) -> int:
    """Return the number of readings of all runs, each step once, reading every line.

    Args:
        path: ``readings.jsonl``.

    Raises:
        OSError: if it cannot be read.
    """
    counted: dict[int, list[int]] = {}
    with path.open("rb") as file:
        for line in file:
            if (facts := _facts(line)) is not None:
                steps = counted.setdefault(facts.run, [])
                del steps[bisect_left(steps, facts.step) :]
                steps.append(facts.step)
    return sum(map(len, counted.values()))


def _facts(line: bytes) -> LineFacts | None:
    """Return a line's facts; None where it is no reading."""
    try:
        return facts_of(line)
    except Exception:  # a damaged line may fail in any way
        return None


def _last_before(file: LineFile, end: int) -> tuple[int, bytes, LineFacts] | None:
    """Return position, bytes and facts of the last reading before a position."""
    found = file.before(end)
    while found is not None:
        if (facts := _facts(found[1])) is not None:
            return *found, facts
        found = file.before(found[0])
    return None


def _starts(file: LineFile, newest: LineFacts) -> list[Start]:
    """Return every start in the file, found by bisection from the last line backwards.

    Run and start only grow along a file.
    """
    starts: list[Start] = []
    facts: LineFacts | None = newest
    while facts is not None:
        wanted = (facts.run, facts.start)
        if starts and wanted >= (starts[0].run, starts[0].start):
            break  # numbers that do not grow: the file was put together by hand

        def holds(line: bytes, wanted: tuple[int, int] = wanted) -> bool | None:
            found = _facts(line)
            return None if found is None else (found.run, found.start) >= wanted

        position = file.first(holds)
        found = file.after(position)
        first = None if found is None else _facts(found[1])
        starts.insert(0, Start(*wanted, (first or facts).step, position))
        before = _last_before(file, position)
        facts = None if before is None else before[2]
    return starts


def _points(file: LineFile, start: int, end: int) -> Iterator[Point]:
    """Yield points of the lines between two positions, evenly apart where they are many."""
    position, apart = start, (end - start) / SAMPLES if end - start > WHOLE_BYTES else 0.0
    while (found := file.after(position, HEAD_BYTES)) is not None and found[0] < end:
        at, line = found
        if (head := head_of(line)) is not None:
            yield Point(*head, at)
        elif (whole := file.after(at)) is not None and (facts := _facts(whole[1])) is not None:
            yield Point(facts.step, facts.loss, at)
        position = at + 1
        if apart:
            due = start + (math.floor((at - start) / apart) + 1) * apart
            position = max(position, int(due))
