"""The base of sinks, their registry, and the group that isolates failures."""

from __future__ import annotations

import logging
import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stabmon.incidents import Incident
from stabmon.records import Reading, StabilityIssue
from stabmon.registry import Registry

logger = logging.getLogger("stabmon")


class Sink:
    """A destination of records, with methods that do nothing until overridden.

    A method may raise: :class:`SinkGroup` catches it.

    Example:
        >>> class LossSink(Sink):
        ...     def write_reading(self, reading, scalars):
        ...         print(reading.step, reading.loss)
        >>> LossSink().write_reading(Reading(10, 2.5, {}), {})
        10 2.5
    """

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        """Prepare to write.

        After a resume it is called again with the same folder: append, do not start afresh.

        Args:
            run_dir: the existing folder ``<run_dir>/stabmon``; None where nothing goes to disk.
            meta: the entries of meta.json.

        Example:
            >>> class MetaSink(Sink):
            ...     def open(self, run_dir, meta):
            ...         print("writes to", run_dir, "with", meta)
            >>> MetaSink().open(None, {"model": "gpt2"})
            writes to None with {'model': 'gpt2'}
        """

    def amend(self, meta: Mapping[str, Any]) -> None:
        """Receive entries of meta.json that are new or changed since :meth:`open`.

        Args:
            meta: these entries alone.

        Example:
            >>> class MetaSink(Sink):
            ...     def amend(self, meta):
            ...         print("also", meta)
            >>> MetaSink().amend({"world_size": 8})
            also {'world_size': 8}
        """

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        """Receive one sampled step.

        Args:
            reading: all measurements of the step.
            scalars: the dashboard's numbers, named as in :mod:`stabmon.sinks.scalars`.

        Example:
            >>> class LossSink(Sink):
            ...     def write_reading(self, reading, scalars):
            ...         print(reading.step, scalars["loss"])
            >>> LossSink().write_reading(Reading(10, 2.5, {}), {"loss": 2.5})
            10 2.5
        """

    def write_issue(self, issue: StabilityIssue) -> None:
        """Receive an issue that opened, worsened or closed.

        Args:
            issue: the issue; its ``state`` is the event.

        Example:
            >>> class IssueSink(Sink):
            ...     def write_issue(self, issue):
            ...         print(issue.issue_type, issue.state)
            >>> issue = StabilityIssue(7, "attn", 0, "logit_growth", "error", 80.0, 50.0, "")
            >>> IssueSink().write_issue(issue)
            logit_growth opened
        """

    def write_issues(self, issues: Sequence[StabilityIssue]) -> None:
        """Receive all issues of one step; by default one after the other.

        Args:
            issues: the issues that opened, worsened or closed at the step.

        Example:
            >>> class IssueSink(Sink):
            ...     def write_issue(self, issue):
            ...         print("head", issue.head)
            >>> one = StabilityIssue(7, "attn", 0, "logit_growth", "error", 80.0, 50.0, "")
            >>> other = StabilityIssue(7, "attn", 1, "logit_growth", "error", 60.0, 50.0, "")
            >>> IssueSink().write_issues([one, other])
            head 0
            head 1
        """
        for issue in issues:
            self.write_issue(issue)

    def write_incidents(self, incidents: Sequence[Incident]) -> None:
        """Receive the incidents that changed at a step: its issues by cause, in words.

        Called right after :meth:`write_issues` of the same step.

        Args:
            incidents: alarms first, of these the causes.

        Example:
            >>> from stabmon.incidents import incidents_of
            >>> class WordsSink(Sink):
            ...     def write_incidents(self, incidents):
            ...         print(incidents[0].text())
            >>> issue = StabilityIssue(7, "attn", 0, "logit_growth", "error", 80.0, 50.0, "")
            >>> WordsSink().write_incidents(incidents_of([issue]))
            attention scores grow in attn head 0: largest score 80.
        """

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        """Receive the audit record of an intervention that was applied or undone.

        Args:
            record: plain values, as in a line of ``interventions.jsonl``.

        Example:
            >>> class AuditSink(Sink):
            ...     def write_intervention(self, record):
            ...         print(record["intervention"], record["action"])
            >>> AuditSink().write_intervention({"intervention": "qk_clip", "action": "applied"})
            qk_clip applied
        """

    def close(self) -> None:
        """Flush and release everything; may be called twice.

        Example:
            >>> class FileSink(Sink):
            ...     def __init__(self, file):
            ...         self.file = file
            ...     def close(self):
            ...         self.file.close()
            >>> import io
            >>> sink = FileSink(io.StringIO())
            >>> sink.close(), sink.close(), sink.file.closed
            (None, None, True)
        """


SINKS: Registry[type[Sink]] = Registry("sink", package="stabmon.sinks")
S = TypeVar("S", bound=type[Sink])
PATIENCE = 5
"""Consecutive failures of a sink after which it is left out."""
_KEPT = 1000
"""Records kept for a failing sink; the oldest are dropped first."""


def sink(cls: S) -> S:
    """Register a sink: ``JsonlSink`` is ``jsonl``.

    The name is the class name in snake case without ``Sink``.

    Args:
        cls: a class derived from :class:`Sink`.

    Returns:
        The class itself.

    Raises:
        ValueError: if another sink has that name.

    Example:
        >>> @sink
        ... class JsonlSink(Sink):
        ...     "A second one."
        Traceback (most recent call last):
        ValueError: sink 'jsonl' is registered twice, ...
    """
    SINKS.register(re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__.removesuffix("Sink")).lower(), cls)
    return cls


class SinkGroup(Sink):
    """Several sinks; a failing one hinders neither the others nor training.

    A failure is logged once. A sink that fails is tried again with the next record. Records that
    met an ``OSError`` (a full disk, a lost connection) are kept, up to 1000, and written then;
    others are counted as lost. After :data:`PATIENCE` failures with no success in between, or where
    it cannot be opened for want of a package or a setting, a sink is left out.

    Args:
        sinks: the sinks, in the order in which they are written.

    Example:
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
