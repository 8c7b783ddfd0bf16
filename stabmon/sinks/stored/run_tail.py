"""The present state of a run, from the new bytes of its records."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from stabmon._storage import strict_json
from stabmon.incidents import Incident, IncidentLog
from stabmon.records import Reading, StabilityIssue
from stabmon.sinks.delivery.gaps import Gap
from stabmon.sinks.jsonl import GAPS, INTERVENTIONS, ISSUES, META, READINGS, SCHEMA_VERSION
from stabmon.sinks.reader import ends_of_starts
from stabmon.sinks.stored.file_tail import FileTail
from stabmon.sinks.stored.lines import MOST_STARTS, audit_of, marks_of
from stabmon.sinks.stored.readings_tail import Point, ReadingsTail

Record = TypeVar("Record")


@dataclass(frozen=True)
class RunState:
    """The newest run in a folder, as known at one look."""

    folder: Path
    """The folder that holds the records."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    run: int = 0
    """Number of the run in its folder; 0 before it began."""
    reading: Reading | None = None
    """The newest reading; None before the first."""
    points: Sequence[Point] = ()
    """Step and loss of readings, in order; a choice where they are many."""
    issues: Sequence[StabilityIssue] = ()
    """Every opening, worsening and closing of this run."""
    earlier_issues: Sequence[StabilityIssue] = ()
    """Those of earlier runs in the same folder."""
    interventions: Sequence[Mapping[str, Any]] = ()
    incidents: Sequence[Incident] = ()
    """The newest state of each incident of this run, in order of number."""
    open_incidents: Sequence[Incident] = ()
    """Those that are open, worst first."""
    gaps: Sequence[Gap] = ()
    """Records of this run that could not be written."""
    last_line: float | None = None
    """Time of the last new reading, in seconds since 1970; None before the first."""
    trouble: str = ""
    """Reason that the records cannot be read now; what is here is older then."""

    @cached_property
    def open_issues(self) -> tuple[StabilityIssue, ...]:
        """The newest state of each open issue."""
        latest = {issue.key: issue for issue in self.issues}
        return tuple(issue for issue in latest.values() if issue.state != "closed")


class RunTail:
    """The records in a folder, followed while a run writes them.

    A file that is truncated or replaced, a run that begins anew, a resumed one, a disk that is away
    for a while: each is met at the next look.

    Args:
        folder: the folder that holds the files; it need not exist yet.

    Example:
        >>> import tempfile
        >>> from stabmon.sinks.jsonl import JsonlSink
        >>> folder, sink = Path(tempfile.mkdtemp()), JsonlSink()
        >>> tail = RunTail(folder)
        >>> sink.open(folder, {})
        >>> tail.look().reading is None
        True
        >>> sink.write_reading(Reading(10, 2.5, {}), {})
        >>> tail.look().reading
        Reading(step=10, loss=2.5, 0 layers, 0 heads)
        >>> sink.close()
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._readings = ReadingsTail(folder / READINGS)
        self._issues = _Lines[StabilityIssue](folder / ISSUES)
        self._interventions = _Lines[dict[str, Any]](folder / INTERVENTIONS)
        self._gaps = _Lines[Gap](folder / GAPS)
        self._meta: dict[str, Any] = {}
        self._meta_seen: tuple[int, ...] = ()
        self._last_line: float | None = None
        self._was_away = True
        self._log, self._grouped = IncidentLog(), tuple[StabilityIssue, ...]()
        self._state = RunState(folder)

    def look(self) -> RunState:
        """Read what is new.

        Returns:
            The run as it is now; as it was, with ``trouble``, where it cannot be read.
        """
        try:
            self.folder.stat()
            self._read_meta()
            new_reading = self._readings.look()
            new_issues = self._issues.look(StabilityIssue.from_dict)
            new_interventions = self._interventions.look(audit_of)
            new_gaps = self._gaps.look(Gap.from_dict)
        except OSError as error:
            self._was_away = True
            return self._with_trouble(error)
        if new_reading and self._readings.written is not None:
            now = time.time()
            self._last_line = min(now, self._readings.written) if self._was_away else now
        self._was_away = False
        news = (new_reading, new_issues, new_interventions, new_gaps)
        changed = any(news) or self._state.trouble
        if changed or self._meta is not self._state.meta:
            self._state = self._made()
        return self._state

    def layer_history(self, layer: str, most: int = 60) -> list[tuple[int, dict[str, np.ndarray]]]:
        """Return step and signals of one layer over the run; empty where they cannot be read.

        Args:
            layer: the layer's name.
            most: largest number of steps.
        """
        try:
            return list(self._readings.layer_history(layer, most))
        except (OSError, ValueError):
            return []

    def _made(self) -> RunState:
        tail = self._readings
        numbers = [run for run, _, _ in self._issues.records[-1:]]
        named = self._meta.get("run", 0)
        known = named if isinstance(named, int) and 0 <= named <= MOST_STARTS else 0
        run = max(tail.run, known, *numbers, 0)
        is_current = run == tail.run
        ends = {
            number: ends_of_starts({each.start: each.first_step for each in starts})
            for number, starts in groupby(tail.starts, key=lambda each: each.run)
        }
        kept = [
            (number, issue)
            for number, start, issue in self._issues.records
            if issue.step < ends.get(number, {}).get(start, float("inf"))
        ]
        issues = tuple(issue for number, issue in kept if number == run)
        self._group(issues)
        return RunState(
            folder=self.folder,
            meta=self._meta,
            run=run,
            reading=tail.newest if is_current else None,
            points=tuple(tail.points) if is_current else (),
            issues=issues,
            earlier_issues=tuple(issue for number, issue in kept if number != run),
            interventions=tuple(
                record
                for number, start, record in self._interventions.records
                if number == run
                and record.get("step", 0) < ends.get(number, {}).get(start, float("inf"))
            ),
            incidents=self._log.all,
            open_incidents=self._log.open,
            gaps=tuple(gap for number, _, gap in self._gaps.records if number == run),
            last_line=self._last_line if is_current else None,
        )

    def _group(self, issues: tuple[StabilityIssue, ...]) -> None:
        """Bring the incidents up to these issues; from the first one where some have gone."""
        known = len(self._grouped)
        if not known or issues[:known] != self._grouped:
            self._log, known = IncidentLog(str(self._meta.get("framework", "loop"))), 0
        for _, of_step in groupby(issues[known:], key=lambda issue: issue.step):
            self._log.update(list(of_step))
        self._grouped = issues

    def _with_trouble(self, error: OSError) -> RunState:
        reason = error.strerror or str(error)
        return replace(self._state, trouble=f"{self.folder}: {reason}")

    def _read_meta(self) -> None:
        """Read meta.json where it changed; it is replaced as a whole."""
        path = self.folder / META
        with contextlib.suppress(FileNotFoundError, ValueError):
            stat = path.stat()
            seen = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
            if seen != self._meta_seen:
                self._meta, self._meta_seen = strict_json.loads(path.read_bytes()), seen


class _Lines(Generic[Record]):
    """All records of a file of issues or interventions, read as they come."""

    def __init__(self, path: Path) -> None:
        self._tail = FileTail(path)
        self.records: list[tuple[int, int, Record]] = []
        """Run, start and record of each line that can be read."""

    def look(self, parse: Any) -> bool:
        """Read what is new, and return whether there is any."""
        with self._tail.opened() as file:
            if file is None:
                return False
            if again := self._tail.is_new(file):
                self.records = []
                self._tail.move_to(file, 0)
            before = len(self.records)
            for _, line in self._tail.new_lines(file):
                self.records += _parsed(line, parse)
            return again or len(self.records) > before


def _parsed(line: bytes, parse: Any) -> Iterator[tuple[int, int, Any]]:
    """Yield run, start and record of a line; nothing for one that cannot be read."""
    with contextlib.suppress(Exception):  # a damaged line may fail in any way
        values = strict_json.loads(line)
        if values.pop("schema_version") == SCHEMA_VERSION:
            record = (*marks_of(values), parse(values))
            yield record
