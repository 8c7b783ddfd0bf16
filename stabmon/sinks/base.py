"""What a sink is, the table of all sinks, and the group that keeps one sink's failure from all others."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stabmon.records import Reading, StabilityIssue
from stabmon.registry import Registry

logger = logging.getLogger("stabmon")


class Sink:
    """A place that records are written to. Override what it has a use for; whatever it raises is caught by the group."""

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        """Get ready.

        ``run_dir`` is ``<run_dir>/stabmon`` (it exists), or None where nothing goes to disk; ``meta`` as in meta.json.
        Called again after a resume with the same ``run_dir``: append, do not start afresh.
        """

    def amend(self, meta: Mapping[str, Any]) -> None:
        """Take entries of ``meta`` that have become known, or have changed, since :meth:`open`."""

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        """Take one sampled step; ``scalars`` are the dashboard's, named as in :mod:`stabmon.sinks.scalars`."""

    def write_issue(self, issue: StabilityIssue) -> None:
        """Take an issue that opened, worsened or closed."""

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        """Take the audit record of an intervention that was applied or undone."""

    def close(self) -> None:
        """Flush and let go. May be called twice."""


SINKS: Registry[type[Sink]] = Registry("sink", package="stabmon.sinks")
S = TypeVar("S", bound=type[Sink])


def sink(cls: S) -> S:
    """Register a sink under its class name in snake case without ``Sink``: ``JsonlSink`` is ``jsonl``."""
    SINKS.register(re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__.removesuffix("Sink")).lower(), cls)
    return cls


class SinkGroup(Sink):
    """Write to several sinks; one that fails is reported once, then left out, and the others go on.

    Args:
        sinks: the sinks, in the order in which they are written.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)
        self.failed: dict[str, str] = {}
        """Class name -> first error of the sinks that were left out."""

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        self._each(lambda s: s.open(run_dir, meta))

    def amend(self, meta: Mapping[str, Any]) -> None:
        self._each(lambda s: s.amend(meta))

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        self._each(lambda s: s.write_reading(reading, scalars))

    def write_issue(self, issue: StabilityIssue) -> None:
        self._each(lambda s: s.write_issue(issue))

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        self._each(lambda s: s.write_intervention(record))

    def close(self) -> None:
        self._each(lambda s: s.close())
        self.sinks.clear()

    def _each(self, act: Callable[[Sink], None]) -> None:
        for one in list(self.sinks):
            try:
                act(one)
            except Exception as error:
                self.sinks.remove(one)
                name = type(one).__name__
                self.failed[name] = f"{type(error).__name__}: {error}"
                logger.warning("%s stopped and is left out: %s. Training and the other sinks go on.", name, self.failed[name])
                self._let_go(one)

    @staticmethod
    def _let_go(broken: Sink) -> None:
        """Close what has failed, so that it holds no file or run open; that this may fail as well is no news."""
        try:
            broken.close()
        except Exception as error:
            logger.debug("%s could not be closed either: %s: %s", type(broken).__name__, type(error).__name__, error)
