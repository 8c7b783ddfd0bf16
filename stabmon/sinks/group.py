"""Several sinks as one, of which a failing one hinders nobody."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stabmon.incidents import Incident
from stabmon.records import Reading, StabilityIssue
from stabmon.sinks.base import Sink

logger = logging.getLogger("stabmon")

PATIENCE = 5
"""Consecutive failures of a sink after which it is left out."""
_KEPT = 1000
"""Records kept for a failing sink; the oldest are dropped first."""


class SinkGroup(Sink):
    """Several sinks; a failing one hinders neither the others nor training.

    A failure is logged once. A sink that fails is tried again with the next record. Records that
    met an ``OSError`` (a full disk, a lost connection) are kept, up to 1000, and written then;
    others are counted as lost. After :data:`PATIENCE` failures with no success in between, or where
    it cannot be opened for want of a package or a setting, a sink is left out.

    Args:
        sinks: the sinks, in the order in which they are written.

    Example:
        >>> from stabmon.sinks import SINKS
        >>> group = SinkGroup([SINKS["jsonl"](), SINKS["console"]()])
        >>> group.open(None, {})
        >>> [type(each).__name__ for each in group.sinks]
        ['JsonlSink', 'ConsoleSink']
        >>> group.close()
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._lines = [_Line(each) for each in sinks]
        self.failed: dict[str, str] = {}
        """Last error of each sink that was left out, by class name."""
        self.troubled: set[str] = set()
        """Class names of the sinks that have failed at least once."""

    @property
    def sinks(self) -> list[Sink]:
        """The sinks that are still written to."""
        return [line.sink for line in self._lines]

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        """Open every sink; see :meth:`Sink.open`."""
        self._each("open", run_dir, meta)

    def amend(self, meta: Mapping[str, Any]) -> None:
        """Give new entries of meta.json to every sink; see :meth:`Sink.amend`."""
        self._each("amend", meta)

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        """Write one sampled step to every sink; see :meth:`Sink.write_reading`."""
        self._each("write_reading", reading, scalars)

    def write_issue(self, issue: StabilityIssue) -> None:
        """Write one issue to every sink; see :meth:`Sink.write_issue`."""
        self.write_issues([issue])

    def write_issues(self, issues: Sequence[StabilityIssue]) -> None:
        """Write the issues of one step to every sink; see :meth:`Sink.write_issues`."""
        if issues:
            self._each("write_issues", issues)

    def write_incidents(self, incidents: Sequence[Incident]) -> None:
        """Write the incidents of one step to every sink; see :meth:`Sink.write_incidents`."""
        if incidents:
            self._each("write_incidents", incidents)

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        """Write one audit record to every sink; see :meth:`Sink.write_intervention`."""
        self._each("write_intervention", record)

    def close(self) -> None:
        """Write the records that wait, close every sink, and report lost records in the log."""
        for line in self._lines:
            broken = False
            for finish in (line.write_waiting, line.sink.close):
                try:
                    finish()
                except Exception as error:
                    broken = True
                    line.last_error = _words(error)
            if broken:
                self.troubled.add(line.name)
                self.failed[line.name] = line.last_error
            if broken or line.lost_in_words():
                reason = "" if line.reported else f" {line.last_error}."
                logger.warning(
                    "%s did not write everything.%s%s", line.name, reason, line.lost_in_words()
                )
        self._lines.clear()

    def _each(self, method: str, *arguments: Any) -> None:
        for line in list(self._lines):
            try:
                line.write(method, arguments)
            except Exception as error:
                self.troubled.add(line.name)
                line.last_error = _words(error)
                if line.times >= PATIENCE or (method == "open" and not isinstance(error, OSError)):
                    self._leave_out(line)
                elif not line.reported:
                    line.reported = True
                    logger.warning(
                        "%s failed and is tried again: %s. Training goes on.",
                        line.name,
                        line.last_error,
                    )

    def _leave_out(self, line: _Line) -> None:
        self._lines.remove(line)
        self.failed[line.name] = line.last_error
        logger.warning(
            "%s stopped and is left out: %s.%s Training and the other sinks go on.",
            line.name,
            line.last_error,
            line.lost_in_words(),
        )
        try:  # a sink that is left out must hold no file or run open
            line.sink.close()
        except Exception as error:
            logger.debug("%s could not be closed either: %s", line.name, _words(error))


class _Line:
    """One sink of a group, and the calls that wait until it works again."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.name = str(getattr(sink, "name", type(sink).__name__))
        self.reported = False
        self.last_error = ""
        self.lost = 0
        self.times = 0
        """Failures of the method that failed last, since its last success."""
        self._waiting: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._failures: Counter[str] = Counter()

    def write(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Make the calls that wait, oldest first, then this one."""
        self._waiting.append((method, arguments))
        if len(self._waiting) > _KEPT:
            self._waiting.popleft()
            self.lost += 1
        self.write_waiting()

    def write_waiting(self) -> None:
        """Make the waiting calls; after an OSError one waits on, another error drops it."""
        while self._waiting:
            method, arguments = self._waiting[0]
            try:
                getattr(self.sink, method)(*arguments)
            except Exception as error:
                self._failures[method] += 1
                self.times = self._failures[method]
                if not isinstance(error, OSError):
                    self._waiting.popleft()
                    self.lost += method != "open"
                raise
            self._waiting.popleft()
            self._failures.pop(method, None)

    def lost_in_words(self) -> str:
        """Return the number of records lost with this sink in words; empty for none."""
        lost = self.lost + sum(method != "open" for method, _ in self._waiting)
        return f" {lost} record{' is' if lost == 1 else 's are'} lost." if lost else ""


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
