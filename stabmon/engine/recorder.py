"""Keep a run's issues, and write readings, issues and interventions to its sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stabmon.engine.error_boundary import ErrorBoundary, contained
from stabmon.records import Reading, StabilityIssue
from stabmon.sinks import Sink, SinkGroup
from stabmon.sinks.scalars import dashboard_scalars


class Recorder:
    """What a run has shown so far, in memory and in its sinks.

    Args:
        sinks: where to write to; none on ranks that do not write.
        folder: ``<run_dir>/stabmon``, made with the first record or step; None where nothing goes
            to disk.
        boundary: told what fails.
    """

    def __init__(self, sinks: Sequence[Sink], folder: Path | None, boundary: ErrorBoundary) -> None:
        self.boundary = boundary
        self.issues: list[StabilityIssue] = []
        self.alarms = 0
        """How many issues were of severity error or above."""
        self._sinks = SinkGroup(sinks)
        self._folder = folder
        self._meta: Callable[[], Mapping[str, Any]] | None = None

    def open(self, meta: Callable[[], Mapping[str, Any]]) -> None:
        """Say what meta.json is to hold; the sinks are opened by :meth:`begin`, so that a run
        without a step leaves nothing.
        """
        self._meta = meta

    def begin(self) -> None:
        """Open the sinks, unless they are: at the first record, or the end of the first step."""
        meta, self._meta = self._meta, None
        if meta is not None:
            self._sinks.open(self._make_folder() if self._sinks.sinks else None, meta())
            self._count_failed()

    def amend(self, meta: Mapping[str, Any]) -> None:
        """Tell the sinks what has become known of the run since they were opened."""
        self._sinks.amend(meta)
        self._count_failed()

    def keep(self, issues: Sequence[StabilityIssue]) -> None:
        """Add to the issues of the run, without writing them."""
        self.issues += issues
        self.alarms += sum(issue.is_alarm for issue in issues)

    def write_reading(
        self, reading: Reading, open_issues: Sequence[StabilityIssue], **more: float
    ) -> None:
        """Write a sampled step; ``more`` goes beside its scalars as ``stability/<name>``."""
        self.begin()
        scalars = dashboard_scalars(reading, open_issues, alarms=self.alarms)
        self._sinks.write_reading(
            reading, scalars | {f"stability/{name}": value for name, value in more.items()}
        )
        self._count_failed()

    def write_issues(self, issues: Sequence[StabilityIssue]) -> None:
        """Write issues as they open, worsen or close."""
        self.begin()
        self._sinks.write_issues(issues)
        self._count_failed()

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        """Write the audit record of something that was done to the run."""
        self.begin()
        self._sinks.write_intervention(record)
        self._count_failed()

    def close(self) -> None:
        """Close the sinks."""
        self._meta = None
        self._sinks.close()
        self._count_failed()

    @contained
    def _make_folder(self) -> Path | None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def _count_failed(self) -> None:
        if self._sinks.troubled:
            self.boundary.errors["sink"] = len(self._sinks.troubled)
