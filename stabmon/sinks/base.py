"""The base of sinks, and their registry."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stabmon.incidents import Incident
from stabmon.records import Reading, StabilityIssue
from stabmon.registry import Registry
from stabmon.sinks.delivery.gaps import Gap

logger = logging.getLogger("stabmon")


class Sink:
    """A destination of records, with methods that do nothing until overridden.

    A method may raise: :class:`SinkGroup` catches it, and calls it again after an ``OSError``.

    :meth:`open` is called on the thread that trains. All other methods are called one at a time, in
    order, by a background thread of this sink, so that one that blocks holds up neither training
    nor other sinks. Records do not change meanwhile. A sink that depends on the training thread (an
    order of rows shared with the training loop, a run active in that thread, random generators)
    sets :attr:`in_background` to False.

    Example:
        >>> class LossSink(Sink):
        ...     def write_reading(self, reading, scalars):
        ...         print(reading.step, reading.loss)
        >>> LossSink().write_reading(Reading(10, 2.5, {}), {})
        10 2.5
    """

    in_background: bool = True
    """Call the sink in a thread of its own; False to call it on the thread that trains."""

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

    def write_gap(self, gap: Gap) -> None:
        """Receive notice of records that were lost before the record written last.

        Called once the sink works again: its disk was full, its server away, or it was too slow.

        Args:
            gap: kind, steps and number of the records.

        Example:
            >>> class GapSink(Sink):
            ...     def write_gap(self, gap):
            ...         print("lost", gap.text())
            >>> GapSink().write_gap(Gap("readings", 40, 95, 12))
            lost 12 readings of steps 40 to 95
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
